"""Taps: what takes part in an attention layer's computation while the layer's own processor runs.

Nothing of a processor's body is copied. A processor with taps is given a class derived from its own, which while it runs
hands calls of `torch.nn.functional.scaled_dot_product_attention` to the taps; projections, norms, rotary embeddings and
everything else stay the model's own, in whatever diffusers release is installed. To diffusers it is the processor that it
was: of the same class, with the same attributes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.attention import Attention, MapRequest, Place, attend, hand_over
from cvg_kernels.pipeline.exchange import plain
from cvg_kernels.pipeline.layers import Layer

_SLOT = "_cvg_taps"  # of an attention module
_OF_TEXT = 2  # calls of attention that a layer makes at most before the text has had its own


class _Given(NamedTuple):
    """The arguments of `scaled_dot_product_attention`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class Tap:
    """Takes part in a layer's attention; subclasses say in what.

    Attributes:
        backend: which implementation of the operations to use.
        computes: whether the attention is computed by our kernels even if nothing is wanted of it: the drop-in swap.
        foreseen: whether `maps` needs to know no more than the place, and there is no band: then the tap is asked before
            the call, and takes part in compiled graphs.
        constant: whether its answers are the same at every call, so that it is asked once.
    """

    backend: str = "auto"
    computes: bool = False
    foreseen: bool = False
    constant: bool = False

    def active(self) -> bool:
        """Whether the tap may want something of the layer now; if none does, the layer runs as ever."""
        return True

    def band(self, attention: Attention) -> dict[str, Any]:
        """The options of `temporal_attention` or `frame_band_attention` that regularise the layer; empty: none."""
        return {}

    def maps(self, place: Place) -> MapRequest | None:
        """The maps that are wanted of the layer, or `None`."""
        return None


@dataclass
class _Turns:
    """Counts the layers that have left maps in one call of a graph."""

    taken: int = 0


@dataclass
class Plan:
    """What is wanted of a compiled layer's next call, and what its graph leaves.

    A graph is compiled anew when Python objects that it looks at have changed, as those of taps do from step to step. It
    looks at this instead, of which nothing changes but tensors, and nothing says which layer it is: the blocks of a network
    share their graph.

    Attributes:
        requests: of the maps of each of the layer's calls of attention.
        computes: whether our kernels compute the layer even if nothing is wanted of it.
        backend: which implementation to use.
        disturbs: as in `Place`.
        turns: of the call, shared by its layers.
        turn: which of them this layer was.
        found: (number of the call of attention, maps for each request).
    """

    requests: tuple[tuple[MapRequest, ...], ...]
    computes: bool
    backend: str
    disturbs: bool
    turns: _Turns
    turn: int = 0
    found: tuple[tuple[int, list[torch.Tensor]], ...] = ()


@dataclass
class _Tapped:
    """The taps of one layer."""

    layer: Layer
    taps: list[Tap]
    #: (intercepting processor, the one that it was made of) of every processor that the layer has had meanwhile.
    made: list[tuple[Any, Any]]
    #: For graphs that hold the layer; without one they break off before it.
    plan: Plan | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # a copy of the layer has none

    def intercept(self) -> None:
        """Gives the present processor the derived class, if it has it not."""
        module = self.layer.module
        for intercepting, stock in self.made:
            if module.processor is intercepting:
                return
            if module.processor is stock:
                module.set_processor(intercepting)
                return
        self.made.append((_intercepting(module.processor), module.processor))
        module.set_processor(self.made[-1][0])

    def decide(self, turns: _Turns) -> None:
        """Asks the taps what a graph shall do."""
        taps = [tap for tap in self.taps if tap.active()]
        if not all(tap.foreseen for tap in taps):
            self.plan = None
            return
        disturbs = _disturbs(self.layer.module.processor.__class__)
        requests = tuple(_requests(taps, Place(self.layer, n, disturbs)) for n in range(_OF_TEXT))
        computes = any(tap.computes for tap in taps)
        self.plan = Plan(requests, computes, _backend(taps, sum(requests, ())), disturbs, turns)

    def decide_at_once(self) -> None:
        """Makes the plan that holds outside of `decide`: that of taps which need not be asked at every call."""
        self.plan = None
        if all(tap.constant for tap in self.taps):
            self.decide(_Turns())

    def release(self) -> None:
        """Gives the layer the processor that it would have without us."""
        module = self.layer.module
        for intercepting, stock in self.made:
            if module.processor is intercepting:
                module.set_processor(stock)


def add_tap(layer: Layer, tap: Tap) -> None:
    """Adds a tap to an attention layer.

    Args:
        layer: of a diffusers model.
        tap: what takes part from now on.
    """
    module = layer.module
    tapped = vars(module).get(_SLOT)
    if tapped is None:
        tapped = _Tapped(layer, [], [])
        tapped.intercept()
        vars(module)[_SLOT] = tapped
    tapped.taps.append(tap)
    tapped.decide_at_once()


def remove_tap(layer: Layer, tap: Tap) -> None:
    """Takes a tap off; with the last one the layer has its processor back, or one that was set meanwhile.

    Args:
        layer: an attention layer.
        tap: one that was added; others are left alone, so the order of leaving does not matter.
    """
    module = layer.module
    tapped = vars(module).get(_SLOT)
    if tapped is None or not any(one is tap for one in tapped.taps):
        return
    tapped.taps = [one for one in tapped.taps if one is not tap]
    tapped.decide_at_once()
    if not tapped.taps:
        del vars(module)[_SLOT]
        tapped.release()


def keep_taps(layer: Layer) -> None:
    """Puts a layer's taps on the processor that somebody has set since they were added.

    Args:
        layer: with or without taps.
    """
    tapped = vars(layer.module).get(_SLOT)
    if tapped is not None:
        tapped.intercept()


def decide(layers: Sequence[Layer]) -> None:
    """Asks the taps of some layers what they want of the next call of a graph that holds the layers.

    Args:
        layers: with or without taps.
    """
    turns = _Turns()
    for layer in layers:
        tapped = vars(layer.module).get(_SLOT)
        if tapped is not None:
            tapped.decide(turns)


def collect(layers: Sequence[Layer]) -> None:
    """Hands over the maps that a graph has left, in the order in which the layers ran.

    Args:
        layers: that it holds, with or without taps.
    """
    left = []
    for layer in layers:
        tapped = vars(layer.module).get(_SLOT)
        if tapped is not None and tapped.plan is not None and tapped.plan.found:
            left.append((layer, tapped.plan))
    for layer, plan in sorted(left, key=lambda pair: pair[1].turn):
        found, plan.found = plan.found, ()
        for number, maps in found:
            place = Place(layer, number, plan.disturbs)
            for request, each in zip(plan.requests[number], maps, strict=True):
                hand_over(place, request, each)


@contextmanager
def tapped(taps: Sequence[tuple[Layer, Tap]]) -> Iterator[None]:
    """Taps of several layers for the length of a `with` block.

    Args:
        taps: pairs of a layer and what takes part in it.
    """
    added = []
    try:
        for layer, tap in taps:
            add_tap(layer, tap)
            added.append((layer, tap))
        yield
    finally:
        for layer, tap in added:
            remove_tap(layer, tap)


def _intercepting(stock: Any) -> Any:
    """The processor with a class derived from its own: both share their attributes."""
    if not hasattr(stock, "__dict__"):
        raise ArgumentError(f"a processor must be an object of a class, got {stock!r}")
    made = object.__new__(_intercepting_class(type(stock)))
    object.__setattr__(made, "__dict__", vars(stock))
    return made


@functools.cache
def _intercepting_class(kind: type) -> type:
    @functools.wraps(kind.__call__)  # diffusers drops arguments that its signature does not name
    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any):
        run = _run_in_graph if torch.compiler.is_compiling() else _run
        return run(kind, self, attn, args, kwargs)

    def __reduce_ex__(self, protocol: int) -> Any:  # copies are stock processors
        return plain(self, kind, {}).__reduce_ex__(protocol)

    members = {
        "__call__": __call__,
        "__class__": property(lambda self: type(self) if _is_traced() else kind),
        "__reduce_ex__": __reduce_ex__,
    }
    return type(kind.__name__, (kind,), members)


def _is_traced() -> bool:
    """Whether the compiler looks at things now; it finds methods by `__class__`, so that must be the true one."""
    return torch._guards.TracingContext.try_get() is not None


@torch.compiler.disable(reason="a tap of the layer cannot be part of a graph")
def _run(kind: type, processor: Any, attn: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """The processor's own call, its attention handed to the active taps."""
    tapped = vars(attn).get(_SLOT)
    taps = [tap for tap in tapped.taps if tap.active()] if tapped else []
    if not taps:
        return kind.__call__(processor, attn, *args, **kwargs)
    return _under(
        _Interception(tapped.layer, taps, _disturbs(kind)), kind, processor, attn, args, kwargs
    )


def _run_in_graph(kind: type, processor: Any, attn: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """As `_run`, by the plan that was made before; the compiler follows this."""
    tapped = getattr(attn, _SLOT, None)
    if tapped is None:
        return kind.__call__(processor, attn, *args, **kwargs)
    plan = tapped.plan
    if plan is None:
        return _run(kind, processor, attn, args, kwargs)
    if not plan.computes and not any(plan.requests):
        return kind.__call__(processor, attn, *args, **kwargs)
    return _under(_Planned(tapped.layer, plan), kind, processor, attn, args, kwargs)


def _under(
    interception: _Mode,
    kind: type,
    processor: Any,
    attn: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
):
    with _native(processor), interception:
        result = kind.__call__(processor, attn, *args, **kwargs)
    if interception.calls == 0:
        raise ArgumentError(
            f"{interception.layer.name} cannot be captured: its processor {kind.__name__} does not call "
            "scaled_dot_product_attention; set the stock PyTorch 2 processor first"
        )
    return result


def _disturbs(kind: type) -> bool:
    """Whether a processor is one of PAG's."""
    return kind.__name__.startswith("PAG")


def _requests(taps: Sequence[Tap], place: Place) -> tuple[MapRequest, ...]:
    return tuple(request for tap in taps if (request := tap.maps(place)))


def _backend(taps: Sequence[Tap], requests: Sequence[MapRequest]) -> str:
    """The backend that somebody names."""
    chosen = (part.backend for part in (*taps, *requests))
    return next((backend for backend in chosen if backend != "auto"), "auto")


@contextmanager
def _native(processor: Any) -> Iterator[None]:
    """A processor that can choose a backend of attention (flash, sage, flex …) calls PyTorch's while we take its place."""
    if not hasattr(processor, "_attention_backend"):
        yield
        return
    own = vars(processor).get("_attention_backend", _SLOT)
    vars(processor)["_attention_backend"] = _native_backend()
    try:
        yield
    finally:
        if own is _SLOT:
            del vars(processor)["_attention_backend"]
        else:
            vars(processor)["_attention_backend"] = own


def _native_backend() -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName.NATIVE


class _Mode(TorchFunctionMode):
    """Hands scaled dot-product attention to `compute` and leaves every other function alone."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:  # whose Python code the compiler cannot follow from here
            return args[0].unflatten(*args[1:], **kwargs)
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = _Given(*args, **kwargs)
        number, self.calls = self.calls, self.calls + 1
        out = self.compute(number, given)
        return func(*args, **kwargs) if out is None else out

    def compute(self, number: int, given: _Given) -> torch.Tensor | None:
        """The output of a call of attention, or `None` to leave it alone."""
        raise NotImplementedError


class _Interception(_Mode):
    """Asks the taps at every call."""

    def __init__(self, layer: Layer, taps: list[Tap], disturbs: bool) -> None:
        super().__init__(layer)
        self.disturbs = disturbs
        self.taps = taps

    def compute(self, number: int, given: _Given) -> torch.Tensor | None:
        attention = Attention(self.layer, number, self.disturbs, *given[:4], given.scale)
        bands = [band for tap in self.taps if (band := tap.band(attention))]
        requests = _requests(self.taps, attention)
        if not bands and not requests and not any(tap.computes for tap in self.taps):
            return None
        if len(bands) > 1:
            raise ArgumentError(
                f"{self.layer.name} is regularised by two methods at once: attach one VSTAR"
            )
        _check_given(given)
        band = bands[0] if bands else {}
        out, found = attend(attention, band, requests, _backend(self.taps, requests))
        for request, maps in zip(requests, found, strict=True):
            hand_over(attention, request, maps)
        return out


class _Planned(_Mode):
    """Does what was planned, and leaves the maps in the plan."""

    def __init__(self, layer: Layer, plan: Plan) -> None:
        super().__init__(layer)
        self.plan = plan

    def compute(self, number: int, given: _Given) -> torch.Tensor | None:
        plan = self.plan
        requests = plan.requests[number] if number < _OF_TEXT else ()
        if not requests and not plan.computes:
            return None
        _check_given(given)
        attention = Attention(self.layer, number, plan.disturbs, *given[:4], given.scale)
        out, found = attend(attention, {}, requests, plan.backend)
        if requests:
            plan.turn, plan.turns.taken = plan.turns.taken, plan.turns.taken + 1
            plan.found = (*plan.found, (number, found))
        return out


def _check_given(given: _Given) -> None:
    if given.dropout_p or given.is_causal or given.enable_gqa:
        raise ArgumentError(
            "attention with dropout, a causal mask or grouped heads cannot be captured; got "
            f"dropout_p={given.dropout_p}, is_causal={given.is_causal}, enable_gqa={given.enable_gqa}"
        )
