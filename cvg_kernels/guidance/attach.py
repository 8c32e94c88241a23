"""The guidance loop on an unmodified pipeline: latents are moved before each guided step, the first included.

Two things are intercepted while attached, on the instances only. The denoiser's call at the start of a step shows the
latents and the text; guidance moves the latents, and the call goes on with the moved ones. The scheduler's `step` is then
given the moved latents too: it is the only other place where a pipeline uses them. So a guided step is exactly "guide,
then step", in any pipeline of that shape.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from cvg_kernels.capture.layers import Model, denoisers_of, model_of
from cvg_kernels.capture.processors import refuse_compiled
from cvg_kernels.capture.prompts import PromptWatch
from cvg_kernels.errors import ArgumentError

_guiding: ContextVar[bool] = ContextVar("guiding", default=False)


def guiding() -> bool:
    """Whether a method is at work: denoiser calls made now are its own, not predictions of the pipeline."""
    return _guiding.get()


@dataclass
class Step:
    """What a guidance method is given at the start of a denoising step: the conditional branch alone."""

    index: int  #: 0 first
    count: int  #: how many steps the pipeline makes
    timestep: float
    pipe: Any
    denoiser: nn.Module
    model: Model
    prompts: list[str]
    latents: torch.Tensor  #: 5-D, with the axes of the denoiser; float32, without gradient
    denoise: Callable[[torch.Tensor], Any]  #: calls the denoiser on latents of that kind


class Method(Protocol):
    """A guidance method."""

    def move(self, step: Step, run: Run) -> torch.Tensor | None:
        """Returns the moved latents, float32, or `None` to leave the step alone."""


@dataclass
class Run:
    """What happened while a method was attached."""

    history: list[dict[str, Any]] = field(
        default_factory=list
    )  #: one entry per evaluation of the loss


class Attachment:
    """Connects a method to a pipeline for the length of a `with` block, which yields the `Run`.

    Args:
        method: what moves the latents.
        pipe: a diffusers pipeline whose denoiser is in `capture.layers.MODELS`.
        prompt: says what the prompt is if the pipeline is called with `prompt_embeds`.

    Raises:
        ArgumentError: for a pipeline without text encoding, scheduler or known denoiser, or a compiled denoiser.
    """

    def __init__(self, method: Method, pipe: Any, prompt: str | list[str] | None = None) -> None:
        for part in ("encode_prompt", "scheduler"):
            if not hasattr(pipe, part):
                raise ArgumentError(f"pipe must have {part}, got {type(pipe).__name__} without it")
        for denoiser in denoisers_of(pipe):
            refuse_compiled(denoiser)
            model_of(denoiser)
        self.method = method
        self.pipe = pipe
        self.run = Run()
        self._watch = PromptWatch(pipe, prompt)
        self._moved_by: torch.Tensor | None = None  # as the latents, set between call and step
        self._step_begun = False
        self._guiding = False

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            stack.enter_context(self._watch)
            for denoiser in denoisers_of(self.pipe):
                hook = denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(self._intercept_scheduler())
            self._stack = stack.pop_all()
        return self.run

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _intercept_scheduler(self) -> Callable[[], None]:
        """Gives `scheduler.step` the moved latents; returns what undoes it."""
        scheduler = self.pipe.scheduler
        step, own = scheduler.step, vars(scheduler).get("step")
        signature = inspect.signature(type(scheduler).step)

        @functools.wraps(step)  # pipelines look at its signature for what they may pass
        def guided_step(*args: Any, **kwargs: Any):
            # By name: CogVideoX's multistep scheduler takes its arguments in another order.
            call = signature.bind(scheduler, *args, **kwargs)
            if self._moved_by is not None:
                shift, sample = self._moved_by, call.arguments["sample"]
                if sample.ndim == 4:  # ModelScope steps on [B·F, C, H, W]
                    shift = shift.transpose(1, 2).reshape(sample.shape)
                call.arguments["sample"] = (sample.float() + shift).to(sample.dtype)
            self._moved_by, self._step_begun = None, False
            return step(*call.args[1:], **call.kwargs)

        def restore() -> None:
            if own is None:
                del scheduler.step
            else:
                scheduler.step = own

        scheduler.step = guided_step
        return restore

    def _before_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Moves the latents at the first denoiser call of a step; later calls of it get the same latents."""
        if self._guiding:
            return None
        model = model_of(denoiser)
        given = kwargs[model.latents] if model.latents in kwargs else args[0]
        scale = self._input_scale(args, kwargs, model)
        if not self._step_begun:
            self._step_begun = True
            self._moved_by = self._guide(denoiser, model, given, scale, args, kwargs)
        if self._moved_by is None:
            return None
        copies = given.shape[0] // self._moved_by.shape[0]
        shift = self._moved_by.repeat(copies, 1, 1, 1, 1) * scale
        moved = (given.float() + shift).to(given.dtype)
        if model.latents in kwargs:
            return args, {**kwargs, model.latents: moved}
        return (moved, *args[1:]), kwargs

    def _input_scale(self, args: tuple, kwargs: dict[str, Any], model: Model) -> float:
        """The factor by which the scheduler scales latents before the denoiser sees them."""
        scale_input = getattr(self.pipe.scheduler, "scale_model_input", None)
        if scale_input is None or not model.batched_branches:  # Wan does not scale
            return 1.0
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        return float(scale_input(torch.ones(1), timestep))

    def _guide(self, denoiser, model, given, scale, args, kwargs) -> torch.Tensor | None:
        """Runs the method on the conditional part of a call; returns by how much it moved the latents."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        now = float(torch.as_tensor(timestep).flatten()[0])
        timesteps = [float(at) for at in self.pipe.scheduler.timesteps]
        text = kwargs["encoder_hidden_states"]
        branches = self._watch.branches(given.shape[0], text, model.batched_branches)
        conditional = [at for at, branch in enumerate(branches) if branch == "cond"]
        if not conditional or now not in timesteps:
            return None
        half = slice(conditional[0], conditional[-1] + 1)
        share = text.shape[0] // given.shape[0]  # texts per sample: one, or one per frame
        options = dict(kwargs)
        options["encoder_hidden_states"] = text[half.start * share : half.stop * share]
        if torch.is_tensor(timestep) and timestep.ndim and timestep.shape[0] == len(branches):
            options["timestep"] = timestep[half]
            args = args[:1]
        latents = given[half].detach().float() / scale

        def denoise(z: torch.Tensor):
            z = (z * scale).to(given.dtype)
            if model.latents in options:
                return denoiser(*args, **{**options, model.latents: z})
            return denoiser(z, *args[1:], **options)

        self._guiding = True
        token = _guiding.set(True)
        frozen = [p for p in denoiser.parameters() if p.requires_grad]
        try:
            for parameter in frozen:  # only the latents' gradient is wanted
                parameter.requires_grad_(False)
            # Inside a pipeline gradients are off, and in inference mode nothing could be differentiated at all.
            with torch.inference_mode(False), torch.enable_grad():
                moved = self.method.move(
                    Step(
                        timesteps.index(now), len(timesteps), now, self.pipe, denoiser, model,
                        self._watch.prompts(), latents.clone(), denoise,
                    ),
                    self.run,
                )  # fmt: skip
        finally:
            self._guiding = False
            _guiding.reset(token)
            for parameter in frozen:
                parameter.requires_grad_(True)
        return None if moved is None else moved.detach() - latents
