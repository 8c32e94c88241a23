"""`Guidance`: what every method has, and where it may take part in a run of a pipeline."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from cvg_kernels.backends import parse_backend
from cvg_kernels.errors import ArgumentError, check_flag, is_whole, nearest
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.layers import Layer
from cvg_kernels.pipeline.session import PipelineSession, Run
from cvg_kernels.pipeline.taps import Tap
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


@dataclass(frozen=True)
class Guidance:
    """A guidance method: settings, and what it does with a denoiser call. Subclasses override what they need.

    Attributes:
        start: share of the denoising steps that pass before it begins.
        stop: share of the denoising steps after which it ends.
        checkpointing: lets the denoiser compute its blocks again in the backward pass of `before_step`, which keeps
            much less memory for the time of one more forward; for methods that move the latents.
        until: old name of `stop`; goes with the next release.
    """

    start: float = field(default=0.0, kw_only=True)
    stop: float = field(default=1.0, kw_only=True)
    checkpointing: bool = field(default=False, kw_only=True)
    until: float | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.until is not None:
            default = next(f.default for f in fields(self) if f.name == "stop")
            if self.stop != default:
                raise ArgumentError(
                    f"until is the old name of stop: give one of them, got {self.until!r} and {self.stop!r}"
                )
            warnings.warn(
                f"until is called stop now: {type(self).__name__}(stop={self.until!r})", FutureWarning, stacklevel=3
            )
            object.__setattr__(self, "stop", self.until)
            object.__setattr__(self, "until", None)
        parse_backend(getattr(self, "backend", "auto"))  # not every method has one
        check_flag("checkpointing", self.checkpointing)
        if self.checkpointing and not self.moves_latents:
            raise ArgumentError(
                f"checkpointing=True is for methods that move the latents by a gradient; {type(self).__name__} has "
                "none"
            )
        check_number("start", self.start, 0, 1)
        check_number("stop", self.stop, 0, 1)
        if self.start > self.stop:
            raise ArgumentError(f"start must not be larger than stop, got {self.start!r} and {self.stop!r}")

    def attach(
        self, pipe: VideoPipeline, prompt: str | list[str] | None = None, *, own_loop: bool = False
    ) -> PipelineSession:
        """Connects to a pipeline; a context manager that yields the `Run`, with its history.

        Args:
            pipe: a diffusers pipeline (AnimateDiff, ModelScope, Latte, Wan, CogVideoX and what derives from them).
            prompt: says what the prompt is if the pipeline is called with `prompt_embeds`.
            own_loop: you call the pipeline's denoiser and scheduler yourself, and the block is one run.

        Raises:
            ArgumentError: for a pipeline that cannot be guided.
        """
        return PipelineSession(pipe, (self,), prompt, own_loop=own_loop)

    def guides(self, call: Call) -> bool:
        """Whether the step of a call is between `start` and `stop`."""
        begin, end = (_whole_steps(fraction * call.count) for fraction in (self.start, self.stop))
        return begin <= call.index < end

    @property
    def idle(self) -> bool:
        """Whether the settings ask for nothing, so that a run without a guided step is as it should be."""
        return self.start == self.stop

    def why_nothing(self, run: Run) -> str | None:
        """Says why no step of a run was guided, if the method knows.

        Args:
            run: whose `notes` it may have written.
        """

    @property
    def moves_latents(self) -> bool:
        """Whether the method has a `before_step`."""
        return type(self).before_step is not Guidance.before_step

    @property
    def changes_modules(self) -> bool:
        """Whether the method has `modules`, for which a compiled denoiser runs uncompiled."""
        return type(self).modules is not Guidance.modules

    def check(self, pipe: VideoPipeline) -> None:
        """Checks that a pipeline can be guided, before anything runs.

        Args:
            pipe: a pipeline with a scheduler and a known denoiser.

        Raises:
            ArgumentError: if it cannot.
        """

    def check_call(self, pipe: VideoPipeline, given: dict[str, Any]) -> None:
        """Checks what a pipeline is called with, before it runs.

        Args:
            pipe: the pipeline.
            given: the arguments of its call, by name.

        Raises:
            ArgumentError: if something is missing.
        """

    def before_step(self, call: Call, run: Run) -> torch.Tensor | None:
        """Moves the latents before a denoising step.

        Args:
            call: the conditional part of the step's first denoiser call. `call.denoise(z)` calls the denoiser and
                returns what that returns.
            run: whose history is written.

        Returns:
            The moved latents, a finite tensor of the shape of `call.latents`, or `None` to leave the step alone, which
            then does not count as guided.
        """

    def processors(self, denoiser: nn.Module, session: PipelineSession) -> list[tuple[Layer, Tap]]:
        """Takes part in attention layers for the length of a run.

        Args:
            denoiser: the network.
            session: says which call is under way.
        """
        return []

    @contextmanager
    def modules(self, denoiser: nn.Module, session: PipelineSession) -> Iterator[None]:
        """Changes other modules for the length of a run.

        Args:
            denoiser: the network.
            session: says which call is under way.
        """
        yield

    def after_prediction(self, call: Call, output: Any) -> Any | None:
        """Changes what the denoiser has predicted.

        Args:
            call: the pipeline's call.
            output: what the denoiser returned.

        Returns:
            What the pipeline is given instead, of the same kind, or `None` to leave it.
        """


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf
) -> None:
    """Checks that a setting is a finite number in a range.

    Args:
        name: name of the setting, for the message.
        value: that was given.
        low: the least that is accepted.
        high: the most that is accepted.
        above: what it must be larger than.

    Raises:
        ArgumentError: if it is not.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and math.isfinite(value) and low <= value <= high and value > above:
        return
    accepted = "a finite number"
    if high < math.inf:
        accepted += f" in [{low:g}, {high:g}]"
    elif low > -math.inf:
        accepted += f" of at least {low:g}"
    elif above > -math.inf:
        accepted += f" above {above:g}"
    raise ArgumentError(f"{name} must be {accepted}, got {value!r}")


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Checks that a setting is a whole number.

    Args:
        name: name of the setting, for the message.
        value: that was given.
        least: the least that is accepted.

    Raises:
        ArgumentError: if it is not.
    """
    if not is_whole(value, least):
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_choice(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Checks that a setting is one of those there are.

    Args:
        name: name of the setting, for the message.
        value: that was given.
        accepted: the choices.

    Raises:
        ArgumentError: if it is not.
    """
    if value not in accepted:
        listed = ", ".join(map(repr, accepted))
        raise ArgumentError(f"{name} must be one of {listed}, got {value!r}{nearest(value, accepted)}")


def _whole_steps(steps: float) -> int:
    """Rounds up, but for what rounding has left: 0.1 · 30 is 3."""
    return math.ceil(steps - 1e-9)
