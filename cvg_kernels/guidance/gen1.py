"""Gen-1's dials: how consistent frames are, how much of a clip's structure is kept, and what is to be seen instead.

"Structure and Content-Guided Video Synthesis with Diffusion Models". Beside the video model's predictions stands that
of the image model: the same network with its temporal layers off, which sees every frame alone. The step from the one
to the other is what time adds, and like any guidance it can be taken further. Structure and content are inputs of a
network: they are prepared for those pipelines of diffusers that take such (`control_inputs.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cvg_kernels.backends import Backend
from cvg_kernels.editing.structure import MOST_ROUNDS, structure_maps
from cvg_kernels.errors import ArgumentError, is_whole
from cvg_kernels.guidance.base import Guidance, check_number
from cvg_kernels.guidance.control_inputs import Wanted, check_given, check_takes, control_inputs
from cvg_kernels.guidance.pictures import grey_pictures, to_images
from cvg_kernels.ops import guidance_mix
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.compiled import uncompiled
from cvg_kernels.pipeline.models import denoisers_of
from cvg_kernels.pipeline.temporal_layers import temporal_layers_off, temporal_modules
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


@dataclass(frozen=True)
class Gen1(Guidance):
    """Gen-1's dials on a pipeline; attach it as a context manager.

        with cvg.Gen1(temporal_scale=2.0).attach(pipe):
            frames = pipe("a red circle moving left").frames[0]

        gen1 = cvg.Gen1(temporal_scale=1.5, structure=3, content="reference.png")
        with gen1.attach(pipe):
            frames = pipe(prompt, **gen1.inputs(pipe, video=clip, depth_model="Intel/dpt-large")).frames[0]

    Structure and content reach the pipeline as arguments of its call, which `inputs` makes; a call without them is an
    error while the method is attached. The temporal scale is guidance. With the image model's prediction μ^π_∅ a step
    uses

        μ^π_∅ + ω_t (μ_∅ − μ^π_∅) + ω (μ_c − μ_∅)

    (∅: without, c: with the prompt; ω: the pipeline's guidance scale). ω_t = 1 is the pipeline as it is, to the bit
    and at its cost. Gen-1 reports smoother clips for ω_t > 1 and freer frames for ω_t < 1; how far that carries over
    to another model is to be measured there. Any ω_t but 1 costs one more evaluation of the unconditional branch, next
    to the pipeline's own and without the temporal layers: less than half a step more, and no more memory.

    The pipeline goes on combining u + ω (c − u) itself: its network is made to return both branches moved by
    (ω_t − 1)(μ_∅ − μ^π_∅), which that combination passes on unchanged. Where the pipeline does no classifier-free
    guidance (guidance scale ≤ 1) there is only one branch, and its own image prediction takes the place of the
    unconditional one: μ^π_c + ω_t (μ_c − μ^π_c).

    Attributes:
        temporal_scale: ω_t. Not given, it is 1.5, but 1 where structure or content is given: not every network that
            takes these has temporal layers.
        backend: which implementation of `guidance_mix` to use.
        structure: t_s, the rounds of blur that depth goes through: 0 keeps every outline, 7 hardly more than where
            there is something. `None`: no structure is given.
        content: shows what is to be seen: an image or several, each of PIL, a path, an array `[H, W, 3]` or a tensor
            `[3, H, W]`; kept as images of PIL. `None`: no content is given but the prompt.
    """

    temporal_scale: float | None = None
    backend: str | Backend = "auto"
    structure: int | None = field(default=None, kw_only=True)
    content: Any = field(default=None, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.structure is not None and (not is_whole(self.structure, 0) or self.structure > MOST_ROUNDS):
            raise ArgumentError(f"structure must be a whole number from 0 to {MOST_ROUNDS}, got {self.structure!r}")
        if self.content is not None:
            object.__setattr__(self, "content", to_images(self.content))
        if self.temporal_scale is None:
            inputs = self.structure is not None or self.content is not None
            object.__setattr__(self, "temporal_scale", 1.0 if inputs else 1.5)
        check_number("temporal_scale", self.temporal_scale)

    def inputs(
        self,
        pipe: VideoPipeline,
        video: Any = None,
        depth: Any = None,
        *,
        depth_model: Any = None,
        distance: bool | None = None,
        height: int | None = None,
        width: int | None = None,
        frame_indices: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Prepares structure and content as the arguments that a pipeline takes them by.

            frames = pipe(prompt, **gen1.inputs(pipe, video=clip, depth_model="Intel/dpt-large")).frames[0]

        They are, with the size and the number of frames that belong to them: `conditioning_frames` for AnimateDiff
        with a ControlNet or SparseCtrl, `video` and `reference_images` for Wan-VACE, `ip_adapter_image` for pipelines
        with an IP-Adapter, `video` or `depth`, `structure` and `image` for `StructureContentPipeline`. docs/gen1.md
        shows each.

        Args:
            pipe: the pipeline that is called with them, attached or not.
            video: the clip whose structure is kept: PIL images, an array `[F, H, W, 3]` or a tensor `[F, 3, H, W]`,
                bytes or in [0, 1].
            depth: depth of the clip, `[F, h, w]`, larger nearer, instead of an estimate; video may be left out then
                where the pipeline does not start from it.
            depth_model: estimates depth: a depth model of transformers with its image processor `(model, processor)`,
                a depth-estimation pipeline, the folder of a saved one, or a name on the Hub, which is downloaded only
                because it is named here. `StructureContentPipeline` has its own.
            distance: whether that model gives distances; `None` reads it off the model.
            height: height of the clip to be made, in pixels; `None` takes that of the clip given, rounded down to what
                the pipeline can make. Frames are scaled to cover the size, and what is over is cut off evenly.
            width: likewise.
            frame_indices: the frames that SparseCtrl is told about; `None`: all.

        Returns:
            Arguments of `pipe(...)` by name.

        Raises:
            ArgumentError: if the pipeline cannot take structure or content (says which can), or an argument does not
                fit.
        """
        if self.structure is None and self.content is None:
            raise ArgumentError(
                "structure or content must be given to Gen1 for there to be inputs, got neither: Gen1(structure=3)"
            )
        return control_inputs(
            pipe,
            Wanted(
                structure=self.structure,
                content=self.content or (),
                video=video,
                depth=depth,
                depth_model=depth_model,
                distance=distance,
                height=height,
                width=width,
                frame_indices=frame_indices,
            ),
        )

    @property
    def idle(self) -> bool:
        """Whether the pipeline is left as it is."""
        return super().idle or self.temporal_scale == 1

    def check(self, pipe: VideoPipeline) -> None:
        """Checks that the pipeline takes structure and content, and has temporal modules to leave out, as far as asked
        for.

        Raises:
            ArgumentError: if not.
        """
        check_takes(pipe, self.structure, self.content or ())
        if self.temporal_scale == 1:
            return
        for denoiser in denoisers_of(pipe):
            try:
                temporal_modules(denoiser)
            except ArgumentError as error:
                raise ArgumentError(
                    f"{error}; without them temporal_scale must be 1, not {self.temporal_scale!r}"
                ) from None

    def check_call(self, pipe: VideoPipeline, given: dict[str, Any]) -> None:
        """Checks that structure and content are in the call, which the pipeline would else run without; see
        `Guidance`.
        """
        check_given(pipe, self.structure, self.content or (), given)

    @property
    def changes_modules(self) -> bool:
        """Whether temporal modules are left out."""
        return self.temporal_scale != 1

    @contextmanager
    def modules(self, denoiser: nn.Module, session: Any) -> Iterator[None]:
        """Runs temporal modules that are compiled as they were written, so that they can be left out."""
        off = temporal_modules(denoiser) if self.changes_modules else []
        with uncompiled(denoiser, off):
            yield

    def after_prediction(self, call: Call, output: Any) -> Any | None:
        """Moves a prediction, in all branches alike, along what the temporal layers add; see `Guidance`."""
        if self.temporal_scale is None or self.temporal_scale == 1:  # never `None`: see `__post_init__`
            return None
        prediction = output[0]  # [B, C, F, h, w]
        samples = call.samples("uncond" if "uncond" in call.branches else "cond")
        base = prediction[samples]
        with temporal_layers_off(call.denoiser):
            image = call.hooks.predict(call.part(samples))[0]
        moved = guidance_mix([image, base], [self.temporal_scale], backend=self.backend)
        parts = [
            moved if place == samples.start else prediction[place : place + len(base)] + (moved - base)
            for place in range(0, len(prediction), len(base))
        ]
        moved = torch.cat(parts) if len(parts) > 1 else moved
        return (moved, *output[1:]) if isinstance(output, tuple) else type(output)(moved)


def structure_frames(depth: torch.Tensor, t_s: int) -> list[Any]:
    """A clip's depth with t_s rounds of detail taken away, as the control images of a depth-conditioned pipeline.

        frames = structure_frames(depth, t_s=3)
        pipe = AnimateDiffControlNetPipeline(..., controlnet=<a ControlNet for depth>)
        with cvg.Gen1(temporal_scale=1.5).attach(pipe):
            video = pipe(prompt, conditioning_frames=frames, num_frames=len(frames))

    Gen-1's own network was trained on such structure at every t_s and takes it beside the latents; it is not public. A
    ControlNet for depth is the nearest thing that diffusers has: it is given the same structure, but has seen sharp
    depth in training, so large t_s is new to it. Where the depth comes from is the user's choice (Gen-1: MiDaS
    DPT-Large).

    Args:
        depth: `[F, h, w]`, larger is nearer; the range of the clip becomes black to white.
        t_s: rounds of `depth_structure`.

    Returns:
        F RGB images (PIL) of h × w.

    Raises:
        ArgumentError: if an argument does not fit.

    Examples:
        >>> from cvg_kernels.guidance import structure_frames
        >>> frames = structure_frames(torch.rand(8, 24, 32), t_s=3)
        >>> len(frames), frames[0].size, frames[0].mode
        (8, (32, 24), 'RGB')
    """
    if not torch.is_tensor(depth) or depth.ndim != 3:
        raise ArgumentError(
            f"depth must be [F, h, w], got {tuple(depth.shape) if torch.is_tensor(depth) else type(depth).__name__}"
        )
    return grey_pictures(structure_maps(depth[None], t_s)[0])
