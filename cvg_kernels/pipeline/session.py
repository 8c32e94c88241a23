"""`PipelineSession`: methods at work on a pipeline for the length of a `with` block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError, GuidanceWarning, check_flag
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.checkpointing import check_checkpointing, checkpointed
from cvg_kernels.pipeline.hooks import PipelineHooks
from cvg_kernels.pipeline.layers import Layer
from cvg_kernels.pipeline.models import denoisers_of, model_of
from cvg_kernels.pipeline.sampling import Sampling
from cvg_kernels.pipeline.schedulers import check_scheduler
from cvg_kernels.pipeline.taps import Tap
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.tokens import check_prompt


@dataclass
class Run:
    """What happened while methods were attached; `with method.attach(pipe) as run` gives one, which fills as it runs.

    Attributes:
        history: one entry per evaluation of a loss.
        calls: how often the pipeline was called.
        notes: what methods have seen that says why they did nothing.
        guided: (number of the pipeline's call, denoising step) of every step that a method changed, in order.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    calls: int = 0
    notes: dict[str, set] = field(default_factory=dict, repr=False)
    guided: list[tuple[int, int]] = field(default_factory=list)
    _last: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def guided_steps(self) -> int:
        """How many denoising steps were guided, in all calls of the pipeline together."""
        return len(self.guided)

    def __enter__(self) -> NoReturn:
        raise ArgumentError(
            "a Run is what a block gives, and cannot be entered: enter what attach(pipe) returns, as often as you like"
        )

    def __exit__(self, *error: object) -> None:
        """Is there for the error of `__enter__` only."""

    def mark(self, call: Call) -> None:
        """Notes that a method has changed the step of a call.

        Args:
            call: any call of the step.
        """
        step = (call.sampling.number, call.sampling.steps)
        if step != self._last:
            self._last = step
            self.guided.append((call.sampling.number, call.index))


class PipelineSession:
    """The handle that `attach` returns: a context manager that connects methods to a pipeline and yields the `Run`.

    It may be entered again once it was left; every block has a `Run` of its own.

    With several methods, those that move the latents do so in turn, each from where the one before has left them; so
    do sessions that are attached one within the other, the outer first.

    Args:
        pipe: a diffusers pipeline whose denoiser is in `models.MODELS`.
        methods: what guides it, each a `guidance.Guidance`.
        prompt: says what the prompt is if the pipeline is called with `prompt_embeds`.
        own_loop: the caller runs the denoiser and the scheduler, not the pipeline's call: the block is one run.

    Attributes:
        run: what happened in the last `with` block.

    Raises:
        ArgumentError: for a pipeline that one of the methods cannot guide.
    """

    def __init__(
        self,
        pipe: VideoPipeline,
        methods: Sequence[Any],
        prompt: str | list[str] | None = None,
        *,
        own_loop: bool = False,
    ) -> None:
        if not isinstance(methods, (tuple, list)) or not methods:
            raise ArgumentError(f"methods must be a list of at least one method, got {methods!r}")
        for method in methods:
            if isinstance(method, type) or not hasattr(method, "before_step"):
                raise ArgumentError(f"methods must hold guidance methods, such as Vico(), got {method!r}")
        check_prompt(prompt)
        check_flag("own_loop", own_loop)
        if isinstance(pipe, nn.Module) or not hasattr(pipe, "scheduler"):
            raise ArgumentError(f"pipe must be a diffusers pipeline with a scheduler, got {type(pipe).__name__}")
        self.methods = tuple(methods)
        self.prompt = prompt
        self._pipe = pipe
        self._own_loop = own_loop
        self._check()
        self.run = Run()

    def _check(self) -> None:
        for denoiser in denoisers_of(self._pipe):
            model_of(denoiser)
        for method in self.methods:
            method.check(self._pipe)
            if getattr(method, "checkpointing", False):
                for denoiser in denoisers_of(self._pipe):
                    check_checkpointing(denoiser)

    def __enter__(self) -> Run:
        self._hooks = PipelineHooks.of(self._pipe)
        self._hooks.check_free(self)
        self.run = Run()
        self._hooks.add(self, own_loop=self._own_loop)
        return self.run

    def __exit__(self, kind: Any, *error: object) -> None:
        self._hooks.remove(self)
        if kind is None:
            self._say_what_did_nothing()

    def _say_what_did_nothing(self) -> None:
        if all(method.idle for method in self.methods):
            return
        entries = [entry for entry in self.run.history if isinstance(entry, dict)]  # or a user's own
        slopes = [entry["gradient_norm"] for entry in entries if "gradient_norm" in entry]
        if self.run.calls == 0:
            reason = f"{type(self._pipe).__name__} was not called while attached to"
        elif not self.run.guided:
            reasons = [method.why_nothing(self.run) for method in self.methods]
            reason = "; ".join(["no denoising step was guided", *filter(None, reasons)])
        elif slopes and not any(bool(slope.any()) for slope in slopes):
            reason = "the gradient of its loss was zero at every evaluation"
        else:
            return
        names = " and ".join(type(method).__name__ for method in self.methods)
        warnings.warn(f"{names} did nothing: {reason}", GuidanceWarning, stacklevel=3)

    # -- what the hooks tell

    def begin_run(self, sampling: Sampling) -> None:
        """Counts a call of the pipeline, and checks what it is made with: parts may have been exchanged."""
        self._check()
        if sampling.options is not None:
            for method in self.methods:
                method.check_call(self._pipe, sampling.options)
        self.run.calls += 1
        if any(method.moves_latents for method in self.methods):
            check_scheduler(self._pipe.scheduler)

    def end_run(self, sampling: Sampling) -> None:
        """Nothing is kept of a run but its `Run`."""

    @property
    def changes_modules(self) -> bool:
        """Whether a method changes modules other than by taps."""
        return any(method.changes_modules for method in self.methods)

    def taps(self, denoiser: nn.Module) -> list[tuple[Layer, Tap]]:
        """What the methods do in attention layers."""
        return [pair for method in self.methods for pair in method.processors(denoiser, self)]

    @contextmanager
    def modules(self, denoiser: nn.Module) -> Iterator[None]:
        """What the methods change in other modules."""
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.modules(denoiser, self))
            yield

    def call_now(self) -> Call | None:
        """The denoiser call that is under way."""
        return self._hooks.call_now()

    def before_call(self, call: Call) -> None:
        """Nothing is done at a call that only goes on with what its step has begun."""

    def moves(self, call: Call) -> bool:
        """Whether a method moves the latents of this step."""
        return any(method.moves_latents and method.guides(call) for method in self.methods)

    def before_step(self, call: Call) -> torch.Tensor | None:
        """Moves the latents of a step by one method after the other."""
        moved = None
        for method in self.methods:
            if not (method.moves_latents and method.guides(call)):
                continue
            saving = getattr(method, "checkpointing", False)
            with checkpointed(call.denoiser) if saving else nullcontext():
                after = method.before_step(call, self.run)
            if after is not None:
                moved = _checked_latents(method, after, call)
                call = replace(call, latents=moved)
                self.run.mark(call)
        return moved

    def after_call(self, call: Call, output: Any) -> Any | None:
        """Lets the methods change a prediction."""
        changed = None
        for method in self.methods:
            if not method.guides(call):
                continue
            before = output if changed is None else changed
            after = method.after_prediction(call, before)
            if after is not None:
                _check_prediction(method, after, before, call)
                changed = after
                self.run.mark(call)
        return changed


def _checked_latents(method: Any, latents: Any, call: Call) -> torch.Tensor:
    """What a method has moved the latents to.

    Raises:
        ArgumentError: unless it is a real tensor of their shape, with finite numbers.
    """
    name, shape = f"{type(method).__name__}.before_step", tuple(call.latents.shape)
    if not torch.is_tensor(latents) or not latents.is_floating_point():
        kind = latents.dtype if torch.is_tensor(latents) else type(latents).__name__
        raise ArgumentError(f"{name} must return real latents {shape} or None, got {kind}")
    if latents.shape != call.latents.shape:
        raise ArgumentError(f"{name} must return latents {shape}, got {tuple(latents.shape)}")
    if not bool(latents.isfinite().all()):
        raise ArgumentError(
            f"{name} must return finite latents, got infinite ones or NaN at step {call.index}: a smaller step_size, "
            "or a wider dtype"
        )
    return latents.detach()


def _check_prediction(method: Any, after: Any, before: Any, call: Call) -> None:
    """Checks what a method has made of a prediction.

    Raises:
        ArgumentError: unless it is of the same kind and shape, with finite numbers.
    """
    name = f"{type(method).__name__}.after_prediction"
    if type(after) is not type(before):
        raise ArgumentError(
            f"{name} must return what it is given, a {type(before).__name__}, or None; got {type(after).__name__}"
        )
    if after[0].shape != before[0].shape:
        raise ArgumentError(f"{name} must return a prediction {tuple(before[0].shape)}, got {tuple(after[0].shape)}")
    if not bool(after[0].isfinite().all()) and bool(before[0].isfinite().all()):
        raise ArgumentError(
            f"{name} must return a finite prediction, got infinite numbers or NaN at step {call.index}"
        )
