"""`PipelineHooks`: all that is put on a pipeline, once for everything attached to it.

The pipeline's own call is the frame: what listens inside is put in place when a call begins and taken away when it
ends, however it ends. So nothing is left behind by an exception, other pipelines that share the denoiser are not
touched, and whatever is set on the pipeline between two calls stays as it was set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.call import Call, repeated, timestep_of
from cvg_kernels.pipeline.compiled import hearing, taking_part, uncompiled
from cvg_kernels.pipeline.exchange import exchange
from cvg_kernels.pipeline.guards import differentiable, without_inference_tensors
from cvg_kernels.pipeline.layers import Layer
from cvg_kernels.pipeline.listening import listening
from cvg_kernels.pipeline.models import arguments_of, denoisers_of, model_of, unwrap
from cvg_kernels.pipeline.pag import Disturbance
from cvg_kernels.pipeline.parallel import adding_up_gradients, context_of
from cvg_kernels.pipeline.sampling import Sampling
from cvg_kernels.pipeline.signatures import named_arguments
from cvg_kernels.pipeline.stepping import Stepping
from cvg_kernels.pipeline.taps import Tap, keep_taps, tapped
from cvg_kernels.pipeline.uninterrupted import uninterrupted
from cvg_kernels.pipeline.video_pipeline import VideoPipeline

_SLOT = "_cvg_hooks"


class Subscriber(Protocol):
    """What is told of a pipeline's calls; see `PipelineSession` and `Capture`."""

    prompt: str | list[str] | None

    @property
    def changes_modules(self) -> bool:
        """Whether `modules` may change what a compiled network would not see."""
        ...

    def begin_run(self, sampling: Sampling) -> None:
        """A call of the pipeline begins."""

    def end_run(self, sampling: Sampling) -> None:
        """A call of the pipeline has ended, perhaps by an exception."""

    def taps(self, denoiser: nn.Module) -> list[tuple[Layer, Tap]]:
        """What takes part in attention layers during a run."""

    def modules(self, denoiser: nn.Module) -> Any:
        """A context manager around a run that changes other modules."""

    def before_call(self, call: Call) -> None:
        """A call of the denoiser by the pipeline, as it is made, moved latents and all."""

    def moves(self, call: Call) -> bool:
        """Whether `before_step` shall be asked at the step that a call begins."""

    def before_step(self, call: Call) -> torch.Tensor | None:
        """The conditional part of the first call of a step → moved latents, or `None`."""

    def after_call(self, call: Call, output: Any) -> Any | None:
        """What the denoiser has returned → what the pipeline is given instead, or `None`."""


class PipelineHooks:
    """Everything that is put on one pipeline; made by `PipelineHooks.of`, gone with its last subscriber.

    Args:
        pipe: a diffusers pipeline.
    """

    def __init__(self, pipe: VideoPipeline) -> None:
        self.pipe = pipe
        self.subscribers: list[Subscriber] = []
        self.runs = 0
        self._forget()

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # a copy of the pipeline has none

    @classmethod
    def of(cls, pipe: VideoPipeline) -> PipelineHooks:
        """The hooks of a pipeline, those that it has or new ones."""
        hooks = vars(pipe).get(_SLOT)
        return cls(pipe) if hooks is None or hooks.pipe is not pipe else hooks

    def add(self, subscriber: Subscriber, own_loop: bool = False) -> None:
        """Lets a subscriber take part in the runs that begin from now on, or in a loop of the user's own that is under
        way.

        Args:
            subscriber: who.
            own_loop: the user calls the denoiser and the scheduler, and not the pipeline: until the subscriber leaves
                is one run.
        """
        self.check_free(subscriber)
        if not self.subscribers:
            methods = {"__call__": self._run}
            if hasattr(type(self.pipe), "encode_prompt"):
                methods["encode_prompt"] = self._encode
            self._restore = exchange(self.pipe, methods)
            vars(self.pipe)[_SLOT] = self
        self.subscribers.append(subscriber)
        try:
            if own_loop and self._sampling is None:
                self._begin(None)
                self._loop_of = subscriber
            elif self._loop_of is not None:
                self._join(subscriber)
        except BaseException:
            self.remove(subscriber)
            raise

    def check_free(self, subscriber: Subscriber) -> None:
        """Refuses a subscriber that is there already, by an `ArgumentError`."""
        if subscriber in self.subscribers:
            raise ArgumentError(f"this handle is attached to the {type(self.pipe).__name__} already: leave it first")

    def remove(self, subscriber: Subscriber) -> None:
        """Takes a subscriber off; the last one leaves the pipeline as it was before the first."""
        if subscriber in self.subscribers:
            uninterrupted(self._remove, subscriber)

    def _remove(self, subscriber: Subscriber) -> None:
        if subscriber is self._loop_of:
            self._end()
        elif id(subscriber) in self._frames:
            self._frames.pop(id(subscriber)).close()
        self.subscribers.remove(subscriber)
        if not self.subscribers:
            vars(self.pipe).pop(_SLOT, None)
            self._restore()

    def call_now(self) -> Call | None:
        """The call that a layer runs in.

        A layer replayed by gradient checkpointing runs in no call, or in that around its own: of the same step, and of
        the same size but for the batch.
        """
        return self._calls[-1] if self._calls and self._calls[-1] is not None else self._last

    # -- a call of the pipeline

    def _run(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's `__call__`."""
        if self._sampling is not None:
            # A pipeline that calls itself, or is called within a loop of the user's own.
            return stock(*args, **kwargs)
        options = named_arguments(type(self.pipe), "__call__", "prompt", args, kwargs)
        try:
            self._begin(options)
            return stock(*args, **kwargs)
        finally:
            uninterrupted(self._end)

    def _begin(self, options: dict[str, Any] | None) -> None:
        """Puts everything in its place for the length of a run."""
        prompt = next((s.prompt for s in self.subscribers if s.prompt is not None), None)
        self._sampling = Sampling(self.pipe, self.runs, options, prompt)
        self.runs += 1
        self._thread = threading.get_ident()
        self._frame = stack = ExitStack()
        self._pag = Disturbance(self.pipe)
        stack.callback(self._pag.end)
        for denoiser in denoisers_of(self.pipe):
            stack.enter_context(hearing(denoiser, self._before, self._after))
        for remove in listening(self.pipe, self._sampling.prompt):
            stack.callback(remove)
        self._stepping = Stepping(self.pipe, self._sampling)
        for subscriber in self.subscribers:
            self._join(subscriber)

    def _join(self, subscriber: Subscriber) -> None:
        """Puts what a subscriber needs in its place until the run ends, or until it leaves."""
        with ExitStack() as stack:
            stack.callback(subscriber.end_run, self._sampling)
            subscriber.begin_run(self._sampling)
            for denoiser in denoisers_of(self.pipe):
                network = unwrap(denoiser)
                taps = subscriber.taps(network)
                stack.enter_context(tapped(taps))
                stack.enter_context(subscriber.modules(network))
                self._layers += [layer for layer, _ in taps]
                stack.enter_context(taking_part(denoiser, [layer for layer, _ in taps]))
                changed = [layer.module for layer, tap in taps if not tap.foreseen]
                if subscriber.changes_modules or context_of(network) is not None:
                    changed.append(network)
                stack.enter_context(uncompiled(denoiser, changed, say=self.runs == 1))
            self._frames[id(subscriber)] = stack.pop_all()

    def _joined(self) -> list[Subscriber]:
        """Those that take part in the present run: who has come meanwhile waits for the next."""
        return [one for one in self.subscribers if id(one) in self._frames]

    def _end(self) -> None:
        """Takes everything away, however the run has ended."""
        with ExitStack() as stack:
            stack.callback(self._forget)
            if self._stepping is not None:
                stack.callback(self._stepping.end)
            stack.push(self._frame)
            for frame in self._frames.values():
                stack.push(frame)

    def _forget(self) -> None:
        """Empties what belongs to a run."""
        self._sampling: Sampling | None = None
        self._stepping: Stepping | None = None
        self._loop_of: Subscriber | None = None  # whose own loop the run is
        self._frame = ExitStack()  # what ends with the run
        self._frames: dict[int, ExitStack] = {}  # of each subscriber
        self._layers: list[Layer] = []  # with taps
        self._calls: list[Call | None] = []  # innermost last: a method calls within a call
        self._last: Call | None = None  # the last of them: a layer may be replayed after its call
        self._own: Call | None = None  # a call that a method is about to make

    def _encode(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's `encode_prompt`."""
        result = stock(*args, **kwargs)
        if self._sampling is not None:
            arguments = named_arguments(type(self.pipe), "encode_prompt", "prompt", args, kwargs)
            self._sampling.prompt.note_encoding(arguments, result)
        return result

    # -- a call of the denoiser

    def _before(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Decodes a call, moves the latents at the first one of a step, and tells the subscribers."""
        if threading.get_ident() != self._thread:
            raise ArgumentError(
                f"{type(unwrap(denoiser)).__name__} is called from another thread while {type(self.pipe).__name__} "
                "runs on it with something attached: let one run end before the other begins, or give each a denoiser "
                "of its own"
            )
        if self._own is not None:
            self._calls.append(self._own)
            self._own = None
            return adding_up_gradients(denoiser, args, kwargs)
        self._calls.append(None)  # whatever happens here, the call ends with one entry less
        stepping = self._stepping
        stepping.watch()
        for layer in self._layers:
            keep_taps(layer)
        arguments, prepares = arguments_of(denoiser, args, kwargs), model_of(denoiser).prepares
        if prepares is not None and prepares(arguments):
            return None
        stepping.close(timestep_of(arguments))
        call = self._calls[-1] = self._decode(denoiser, arguments)
        if not stepping.begun:
            stepping.begin(call)
            if call.leading:
                stepping.shift, stepping.start = self._shift(call)
        if stepping.shift is not None:
            shift = repeated(stepping.shift, call.branches, self._sampling.samples)
            moved = (call.latents + shift * stepping.factor()).to(call.latents.dtype)
            call = replace(call, arguments=call.with_latents(moved), latents=moved)
            self._calls[-1] = call
        for subscriber in self._joined():
            subscriber.before_call(call)
        given = (args, kwargs) if stepping.shift is None else ((), call.arguments)
        return adding_up_gradients(denoiser, *given)

    def _after(self, denoiser: nn.Module, args: tuple, output: Any) -> Any | None:
        """Ends a call, also a failed one; its prediction may be exchanged."""
        if threading.get_ident() != self._thread:  # refused by `_before`
            return None
        self._last = call = self._calls.pop()
        if call is None or call.own or output is None:
            return None
        for subscriber in self._joined():
            changed = subscriber.after_call(call, output)
            output = output if changed is None else changed
        return output

    def _decode(self, denoiser: nn.Module, arguments: dict[str, Any]) -> Call:
        """A call in the terms that everybody reads."""
        sampling, model = self._sampling, model_of(denoiser)
        latents = model.named(arguments, getattr(unwrap(denoiser), "config", None))
        timestep = timestep_of(arguments)
        index, count, leading = self._stepping.locate(timestep)
        return Call(
            self.pipe,
            denoiser,
            arguments,
            latents,
            sampling.branches(model, latents.shape[0], arguments),
            index,
            count,
            timestep,
            leading,
            sampling=sampling,
            hooks=self,
            section=self._stepping.section,
        )

    def _shift(self, call: Call) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Asks the subscribers to move the conditional latents of a step; returns by how much they did, and from
        where.
        """
        movers = [subscriber for subscriber in self._joined() if subscriber.moves(call)]
        samples = call.samples("cond")
        if not movers or samples == slice(0, 0):
            return None, None
        part, factor = call.part(samples), self._stepping.factor()
        wide = torch.promote_types(part.latents.dtype, torch.float32)
        noisy, start = part.noisy(), part.latents.detach().to(wide) / factor
        moved = False
        with differentiable(call.denoiser), self._pag.lifted(call.denoiser), ExitStack() as stack:
            arguments = without_inference_tensors(part.arguments)
            part = replace(part, arguments=arguments, latents=start, scale=factor)
            stack.enter_context(self._within(replace(part, own=True)))
            for subscriber in movers:
                after = subscriber.before_step(replace(part, latents=part.latents.clone()))
                if after is not None:
                    after = after.detach()
                    after = after if noisy is None else torch.where(noisy, after, start)
                    moved, part = True, replace(part, latents=after)
        return (part.latents - start, start) if moved else (None, None)

    @contextmanager
    def _within(self, call: Call) -> Iterator[None]:
        """What a layer sees that is replayed in a method's backward pass."""
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.pop()

    def predict(self, call: Call, latents: torch.Tensor | None = None) -> Any:
        """Calls the denoiser for a method: no prediction of the pipeline.

        Args:
            call: whose arguments to use.
            latents: others than the call's, as the denoiser is given them.
        """
        arguments = call.arguments if latents is None else call.with_latents(latents)
        own = replace(call, own=True, arguments=arguments)
        with self._owned(own), self._pag.lifted(call.denoiser):
            return call.denoiser(**arguments)

    @contextmanager
    def _owned(self, call: Call) -> Iterator[None]:
        self._own = call
        try:
            yield
        finally:
            self._own = None
