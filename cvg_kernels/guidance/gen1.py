"""Gen-1: the temporal guidance scale of a video model.

"Structure and Content-Guided Video Synthesis with Diffusion Models". Beside the video model's predictions stands that of
the image model: the same network with its temporal layers off, which sees every frame alone. The step from the one to the
other is what time adds, and like any guidance it can be taken further.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cvg_kernels.backends import Backend
from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.base import Guidance, check_number
from cvg_kernels.ops import depth_structure, guidance_mix
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.compiled import uncompiled
from cvg_kernels.pipeline.exchange import replaced_forwards
from cvg_kernels.pipeline.models import MODELS, denoisers_of, model_of, unwrap


@dataclass(frozen=True)
class Gen1(Guidance):
    """Gen-1's temporal guidance; attach it to a pipeline as a context manager.

        with cvg.Gen1(temporal_scale=2.0).attach(pipe):
            frames = pipe("a red circle moving left").frames[0]

    With the image model's prediction μ^π_∅ a step uses

        μ^π_∅ + ω_t (μ_∅ − μ^π_∅) + ω (μ_c − μ_∅)

    (∅: without, c: with the prompt; ω: the pipeline's guidance scale). ω_t = 1 is the pipeline as it is, to the bit and at
    its cost. Gen-1 reports smoother clips for ω_t > 1 and freer frames for ω_t < 1; how far that carries over to another
    model is to be measured there. Any ω_t but 1 costs one more evaluation of the unconditional branch, next to the
    pipeline's own and without the temporal layers: less than half a step more, and no more memory.

    The pipeline goes on combining u + ω (c − u) itself: its network is made to return both branches moved by
    (ω_t − 1)(μ_∅ − μ^π_∅), which that combination passes on unchanged. Where the pipeline does no classifier-free guidance
    (guidance scale ≤ 1) there is only one branch, and its own image prediction takes the place of the unconditional
    one: μ^π_c + ω_t (μ_c − μ^π_c).

    Attributes:
        temporal_scale: ω_t.
        backend: which implementation of `guidance_mix` to use.
    """

    temporal_scale: float = 1.5
    backend: str | Backend = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temporal_scale", self.temporal_scale)

    @property
    def idle(self) -> bool:
        """Whether the pipeline is left as it is."""
        return super().idle or self.temporal_scale == 1

    def check(self, pipe: Any) -> None:
        """Checks that the denoiser has temporal modules that can be left out.

        Raises:
            ArgumentError: if not.
        """
        for denoiser in denoisers_of(pipe):
            temporal_modules(denoiser)

    @contextmanager
    def modules(self, denoiser: nn.Module, session: Any) -> Iterator[None]:
        """Runs temporal modules that are compiled as they were written, so that they can be left out."""
        with uncompiled(denoiser, temporal_modules(denoiser)):
            yield

    def after_prediction(self, call: Call, output: Any) -> Any | None:
        """Moves a prediction, in all branches alike, along what the temporal layers add; see `Guidance`."""
        if self.temporal_scale == 1:
            return None
        prediction = output[0]  # [B, C, F, h, w]
        samples = call.samples("uncond" if "uncond" in call.branches else "cond")
        base = prediction[samples]
        with temporal_layers_off(call.denoiser):
            image = call.hooks.predict(call.part(samples))[0]
        moved = guidance_mix([image, base], [self.temporal_scale], backend=self.backend)
        parts = [
            moved
            if place == samples.start
            else prediction[place : place + len(base)] + (moved - base)
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
    ControlNet for depth is the nearest thing that diffusers has: it is given the same structure, but has seen sharp depth
    in training, so large t_s is new to it. Where the depth comes from is the user's choice (Gen-1: MiDaS DPT-Large).

    Args:
        depth: `[F, h, w]`, larger is nearer; the range of the clip becomes black to white.
        t_s: rounds of `depth_structure`.

    Returns:
        F RGB images (PIL) of h × w.

    Raises:
        ArgumentError: if an argument does not fit.
    """
    from PIL import Image

    if depth.ndim != 3:
        raise ArgumentError(f"depth must be [F, h, w], got {tuple(depth.shape)}")
    low, high = torch.aminmax(depth.float())
    grey = (depth_structure(depth.float()[None], t_s)[0] - low) / (high - low).clamp_min(1e-12)
    pixels = (255 * grey).round().clamp(0, 255).byte().cpu().numpy()
    return [Image.fromarray(frame).convert("RGB") for frame in pixels]


def temporal_modules(denoiser: nn.Module) -> list[nn.Module]:
    """Lists the modules through which alone the frames of a denoiser see each other.

    Raises:
        ArgumentError: for a class that has no such modules, or is not known.
    """
    names = model_of(denoiser).temporal_modules
    if names is None:
        accepted = ", ".join(kind for kind, model in MODELS.items() if model.temporal_modules)
        raise ArgumentError(
            f"denoiser must have temporal layers of its own ({accepted}), got {type(unwrap(denoiser)).__name__}"
        )
    return [m for name, m in unwrap(denoiser).named_modules() if names.search(name)]


@contextmanager
def temporal_layers_off(denoiser: nn.Module) -> Iterator[None]:
    """Makes a video model an image model: inside the block its temporal layers give back what they get.

    Args:
        denoiser: a `UNetMotionModel` or `UNet3DConditionModel`.

    Raises:
        ArgumentError: for another class.
    """

    def identity(hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        # Transformers are asked for a tuple, motion modules and convolutions for a tensor.
        return (hidden_states,) if kwargs.get("return_dict") is False else hidden_states

    with replaced_forwards(dict.fromkeys(temporal_modules(denoiser), identity)):
        yield
