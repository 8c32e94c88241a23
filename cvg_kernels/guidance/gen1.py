"""Gen-1: how much the frames of a clip listen to each other.

"Structure and Content-Guided Video Synthesis with Diffusion Models". Beside the video model's predictions stands that of
the image model: the same network with its temporal layers off, which sees every frame alone. The step from the one to the
other is what time adds, and like any guidance it can be taken further.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from cvg_kernels.backends import Backend, parse_backend
from cvg_kernels.capture.layers import attention_layers, denoisers_of, model_of, unwrap
from cvg_kernels.capture.processors import InterceptingProcessor, installed, refuse_compiled
from cvg_kernels.capture.prompts import PromptWatch
from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.attach import Run, guiding
from cvg_kernels.ops import depth_structure, guidance_mix

#: Denoiser class → names of the modules through which alone its frames see each other; each adds to what it is given.
_TEMPORAL_MODULES = {
    "UNetMotionModel": re.compile(r"motion_modules\.\d+$"),
    "UNet3DConditionModel": re.compile(r"(temp_convs|temp_attentions)\.\d+$|^transformer_in$"),
}


@dataclass(frozen=True)
class Gen1:
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
        start: share of the denoising steps that pass before it begins.
        until: share of the denoising steps after which it ends.
        backend: of `guidance_mix`.
    """

    temporal_scale: float = 1.5
    start: float = 0.0
    until: float = 1.0
    backend: str | Backend = "auto"

    def __post_init__(self) -> None:
        if not math.isfinite(self.temporal_scale):
            raise ArgumentError(f"temporal_scale must be finite, got {self.temporal_scale!r}")
        if not 0 <= self.start <= self.until <= 1:
            raise ArgumentError(
                f"start and until must lie in [0, 1] in this order, got {self.start!r} and {self.until!r}"
            )
        parse_backend(self.backend)

    def attach(self, pipe: Any, prompt: str | list[str] | None = None) -> Gen1Attachment:
        """Guides the pipeline's calls inside a `with` block, which yields a `Run` (without history: nothing is optimised).

        Args:
            pipe: a diffusers pipeline on a `UNetMotionModel` (AnimateDiff) or `UNet3DConditionModel` (ModelScope).
            prompt: as for other methods; not used.

        Raises:
            ArgumentError: for a pipeline without text encoding, scheduler or such a denoiser, or with a compiled one.
        """
        return Gen1Attachment(self, pipe)


class Gen1Attachment:
    """Connects Gen-1's guidance to a pipeline; made by `Gen1.attach`."""

    def __init__(self, method: Gen1, pipe: Any) -> None:
        for part in ("encode_prompt", "scheduler"):
            if not hasattr(pipe, part):
                raise ArgumentError(f"pipe must have {part}, got {type(pipe).__name__} without it")
        self.method = method
        self.pipe = pipe
        for denoiser in denoisers_of(pipe):
            refuse_compiled(denoiser)
            for module in temporal_modules(denoiser):
                refuse_compiled(module)
        self._watch = PromptWatch(pipe)

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            if self.method.temporal_scale != 1:  # else nothing is touched
                stack.enter_context(self._watch)
                forwards = {
                    denoiser: partial(self._forward, denoiser, denoiser.forward)
                    for denoiser in denoisers_of(self.pipe)
                }
                stack.enter_context(_replaced(forwards))
            self._stack = stack.pop_all()
        return Run()

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _forward(self, denoiser: nn.Module, stock: Callable[..., Any], *args: Any, **kwargs: Any):
        """The denoiser's forward: its output, both branches moved along what the temporal layers add."""
        output = stock(*args, **kwargs)
        if guiding() or not self._active(kwargs["timestep"] if "timestep" in kwargs else args[1]):
            return output
        prediction = output[0]  # [B, C, F, h, w], the unconditional samples first
        batch = prediction.shape[0]
        count = self._watch.samples if batch == 2 * self._watch.samples else batch

        def first(tensor: torch.Tensor) -> torch.Tensor:
            """The part that belongs to the first `count` samples, of whatever there is for every sample (and frame)."""
            if tensor.ndim == 0 or tensor.shape[0] % batch:
                return tensor
            return tensor[: tensor.shape[0] // batch * count]

        args, kwargs = tree_map_only(torch.Tensor, first, (args, kwargs))
        with temporal_layers_off(denoiser), _nothing_intercepted(denoiser):
            image = stock(*args, **kwargs)[0]
        base = prediction[:count]
        moved = guidance_mix(
            [image, base], [self.method.temporal_scale], backend=self.method.backend
        )
        if count < batch:
            moved = torch.cat([moved, prediction[count:] + (moved - base)])
        return (moved, *output[1:]) if isinstance(output, tuple) else type(output)(moved)

    def _active(self, timestep: Any) -> bool:
        """Whether the step of a timestep is among those that are guided."""
        timesteps = [float(at) for at in self.pipe.scheduler.timesteps]
        now = float(torch.as_tensor(timestep).flatten()[0])
        if now not in timesteps:
            return False
        count = len(timesteps)
        begin, end = (math.ceil(share * count) for share in (self.method.start, self.method.until))
        return begin <= timesteps.index(now) < end


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
    """The modules through which alone the frames of a denoiser see each other.

    Raises:
        ArgumentError: for a class that has no such modules, or is not known.
    """
    model_of(denoiser)
    kind = type(unwrap(denoiser)).__name__
    if kind not in _TEMPORAL_MODULES:
        raise ArgumentError(
            f"denoiser must have temporal layers of its own ({', '.join(_TEMPORAL_MODULES)}), got {kind}"
        )
    names = _TEMPORAL_MODULES[kind]
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

    with _replaced(dict.fromkeys(temporal_modules(denoiser), identity)):
        yield


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Gives modules another forward, on the instances only, and puts the old ones back, whatever happens."""
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before


@contextmanager
def _nothing_intercepted(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser with the processors inside any of ours: captures do not record the image model."""
    inner = {
        layer.module: layer.module.processor.inner
        for layer in attention_layers(denoiser)
        if isinstance(layer.module.processor, InterceptingProcessor)
    }
    with installed(inner):
        yield
