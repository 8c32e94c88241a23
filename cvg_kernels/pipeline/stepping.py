"""`Stepping`: the steps of one run, and how a move of the latents enters them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.exchange import exchange
from cvg_kernels.pipeline.models import Model
from cvg_kernels.pipeline.sampling import Sampling
from cvg_kernels.pipeline.schedule import Schedule
from cvg_kernels.pipeline.scheduler_memory import OwnMemory, moved
from cvg_kernels.pipeline.schedulers import moved_step
from cvg_kernels.pipeline.signatures import named_arguments
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


class Stepping:
    """Listens to a pipeline's scheduler for the length of a run.

    Args:
        pipe: the pipeline.
        sampling: the run.

    Attributes:
        shift: by which the latents of this step are moved, `[samples, C, F, H, W]`, or `None`.
        start: from where: the latents as the denoiser was given them, in the scheduler's scale.
    """

    def __init__(self, pipe: VideoPipeline, sampling: Sampling) -> None:
        self.pipe = pipe
        self._sampling = sampling
        self._scheduler: Any = None  # the one that is listened to
        self._give_back = lambda: None
        self._schedule: Schedule | None = None
        self._own_memory: OwnMemory | None = None  # of the scheduler; `None` before its first step
        self._made: _Made | None = None  # by the scheduler since the denoiser was called
        self._forget_step()
        self.watch()

    def _forget_step(self) -> None:
        self._timestep: float | None = None  # of the step under way
        self._model: Model | None = None
        self.shift: torch.Tensor | None = None
        self.start: torch.Tensor | None = None
        #: How the pipeline scales the denoiser's input.
        self._scaling: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._own_scale: float | None = None  # where the pipeline does it by itself
        self._sampling.end_step()

    @property
    def begun(self) -> bool:
        """Whether the denoiser has been called for the step under way."""
        return self._timestep is not None

    def begin(self, call: Call) -> None:
        """Notes the first denoiser call of a step."""
        self._timestep, self._model, self._made = call.timestep, call.model, None
        self._sampling.steps += call.leading
        if call.model.scaled_by is None:
            return
        # Of the scheduler: the denoiser is told in its own dtype, perhaps a coarse one.
        scale = call.model.scaled_by(call.arguments, float(self._scheduler.sigmas[call.index]))
        if scale != 1:
            self._scaling, self._own_scale = (lambda sample: sample * scale), scale

    def watch(self) -> None:
        """Listens to the scheduler that the pipeline has now: it may be exchanged between two steps."""
        scheduler = getattr(self.pipe, "scheduler", None)
        if scheduler is self._scheduler:
            return
        self.end()
        self._scheduler = scheduler
        if scheduler is None:
            return
        methods = {"step": self._step}
        if hasattr(scheduler, "scale_model_input"):
            methods["scale_model_input"] = self._scale
        self._give_back = exchange(scheduler, methods)

    def end(self) -> None:
        """Gives the scheduler back."""
        self._give_back()
        self._scheduler, self._give_back = None, lambda: None
        self._schedule = self._own_memory = None

    @property
    def section(self) -> int:
        """Number of the section that the run is in, 0 first; see `Schedule`."""
        return 0 if self._schedule is None else self._schedule.section

    def locate(self, timestep: float) -> tuple[int, int, bool]:
        """Says where a denoiser call stands; see `Schedule.locate`."""
        if self._schedule is None:
            self._schedule = Schedule(self._scheduler)
        return self._schedule.locate(timestep)

    def factor(self) -> float:
        """The factor by which the pipeline has scaled the latents before the denoiser sees them."""
        return 1.0 if self._scaling is None else float(self._scaling(torch.ones(1)))

    def close(self, timestep: float) -> None:
        """Ends a step whose `scheduler.step` has not been seen when the denoiser is called for the next.

        Args:
            timestep: timestep of the denoiser's call.

        Raises:
            ArgumentError: if its latents were moved: the sample that went on was not.
        """
        if self._timestep is None or self._timestep == timestep:
            return
        if self.shift is not None:
            raise ArgumentError(
                f"{type(self.pipe).__name__} does not step with the `step` of its own scheduler, so the latents that "
                "a method moves are lost: they cannot be guided there"
            )
        self._advance()

    def _advance(self) -> None:
        self._forget_step()
        if self._schedule is not None:
            self._schedule.advance()

    def _step(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's `step`: its sample is the moved one."""
        # By name: CogVideoX's multistep scheduler takes its arguments in another order.
        given = named_arguments(type(self._scheduler), "step", "sample", args, kwargs)
        prepared = self._made
        if prepared is None or not prepared.again(given):  # Cosmos asks twice: for x₀, and for the step
            prepared = _Made(given.get("timestep"), self._model, self.shift, self.start, self._own_scale)
            self._advance()
            self._made = prepared
        if self._own_memory is None:
            self._own_memory = OwnMemory(self._scheduler)
        if prepared.shift is None:
            return stock(*args, **kwargs)
        self._own_memory.check(self._scheduler)
        try:
            inspect.signature(stock).bind(**given)
            sample = given["sample"]
        except (TypeError, KeyError):
            raise ArgumentError(
                f"scheduler {type(self._scheduler).__name__}: latents cannot be moved: its own `step` must name "
                "model_output, timestep and sample, or take any arguments"
            ) from None
        shift = _fitted(prepared.shift, sample, prepared.model)
        if shift is None:
            raise ArgumentError(
                f"{type(self.pipe).__name__} steps on a sample of shape {tuple(sample.shape)}, whose latents in the "
                f"denoiser are of shape {tuple(prepared.model.native(prepared.shift).shape)}: they cannot be moved"
            )
        if _others(_fitted(prepared.start, sample, prepared.model), sample):
            raise ArgumentError(
                f"{type(self.pipe).__name__} gives its denoiser other latents than its scheduler steps on, perhaps "
                "scaled by itself: a move of the ones is not known in the other, so they cannot be guided there"
            )
        shift = shift.to(sample.device)
        if prepared.scale is not None:
            # Of the pipeline's x₀ = c · x + …, the noise (x − x₀) / σ moves by (1 − c) / σ = c times the move.
            given = {**given, "model_output": moved(given["model_output"], prepared.scale * shift)}
        return moved_step(stock, self._scheduler, given, shift)

    def _scale(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's `scale_model_input`: pipelines that call it give the denoiser latents on another scale."""
        rest = args[1:]
        self._scaling = lambda sample: stock(
            sample, *rest, **{name: value for name, value in kwargs.items() if name != "sample"}
        )
        return stock(*args, **kwargs)


@dataclass(frozen=True)
class _Made:
    """A step that the scheduler has made."""

    timestep: Any
    model: Model | None
    shift: torch.Tensor | None
    start: torch.Tensor | None
    scale: float | None

    def again(self, given: dict[str, Any]) -> bool:
        """Whether a call of the scheduler asks for the same step once more."""
        return self.model is not None and given.get("timestep") is self.timestep


def _others(start: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether most of a sample is not what the denoiser was given, but for rounding: frames that are given are
    replaced.
    """
    wide, start = sample.float(), start.to(sample.device)
    start = start.repeat(len(wide) // len(start), *[1] * (start.ndim - 1))
    apart = (wide - start).abs() > 2**-6 * wide.abs() + 2**-6 * wide.std()
    return bool(apart.float().mean() > 0.5)


def _fitted(shift: torch.Tensor, sample: torch.Tensor, model: Model) -> torch.Tensor | None:
    """A move `[B, C, F, H, W]` of latents with its axes as the sample of a scheduler has them; `None` if none fits.

    Args:
        shift: the move.
        sample: that the scheduler steps on: as the denoiser is given it, or `[B, C, F, H, W]`, or `[B·F, C, H, W]`;
            perhaps without the first frames, which are given, or with the tokens of a condition.
        model: entry of the denoiser.
    """
    for given in range(shift.shape[2]):
        rest = shift[:, :, given:]
        native = model.native(rest)
        if model.axes == "BNC" and sample.ndim == 3 and sample.shape[1] > native.shape[1]:
            beside = sample.shape[1] - native.shape[1]
            native = pad(native, (0, 0, 0, beside) if model.condition_behind else (0, 0, beside, 0))
        for form in (native, rest, rest.transpose(1, 2).flatten(0, 1)):
            if _fits(form, sample):
                return form
    return None


def _fits(form: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether a sample is of the shape of latents, perhaps of several branches of guidance."""
    return form.shape[1:] == sample.shape[1:] and len(sample) % len(form) == 0
