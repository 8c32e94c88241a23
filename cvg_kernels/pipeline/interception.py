"""Processors whose calls of attention go to taps.

Nothing of a processor's body is copied. A processor with taps is given a class derived from its own, which while it
runs hands calls of `torch.nn.functional.scaled_dot_product_attention` to the taps; projections, norms, rotary
embeddings and everything else stay the model's own, in whatever diffusers release is installed. To diffusers it is the
processor that it was: of the same class, with the same attributes.

The compiler follows all this into its graph, where a `Plan` says what the taps want.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.attention import Attention, attend
from cvg_kernels.pipeline.exchange import plain
from cvg_kernels.pipeline.layers import Layer
from cvg_kernels.pipeline.parallel import context_of
from cvg_kernels.pipeline.tap import SLOT, Plan, Samples, Tap, backend_of, disturbs_samples, requests_of


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


def intercepting(stock: Any) -> Any:
    """The processor with a class derived from its own: both share their attributes."""
    if not hasattr(stock, "__dict__"):
        raise ArgumentError(f"a processor must be an object of a class, got {stock!r}")
    processor = object.__new__(_intercepting_class(type(stock)))
    object.__setattr__(processor, "__dict__", vars(stock))
    return processor


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


def _outside_graphs(reason: str):
    """Keeps a function out of the compiler's graphs, and says why where torch takes the reason."""
    takes = "reason" in inspect.signature(torch.compiler.disable).parameters
    return torch.compiler.disable(**({"reason": reason} if takes else {}))


@_outside_graphs("a tap of the layer cannot be part of a graph")
def _run(kind: type, processor: Any, attn: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """The processor's own call, its attention handed to the active taps."""
    tapped = vars(attn).get(SLOT)
    taps = [tap for tap in tapped.taps if tap.active()] if tapped else []
    if not taps:
        return kind.__call__(processor, attn, *args, **kwargs)
    interception = _Interception(tapped.layer, taps, disturbs_samples(kind))
    try:
        return _under(interception, kind, processor, attn, args, kwargs)
    except ValueError as error:
        _refuse_ring(processor, interception, error)
        raise


def _refuse_ring(processor: Any, interception: _Mode, error: ValueError) -> None:
    """Says why PyTorch's attention cannot stand in for a ring of processes, each with a share of the keys."""
    context = context_of(processor)
    if context is None or context.ring_degree == 1 or interception.calls:
        return
    raise ArgumentError(
        f"{interception.layer.name} attends by a ring of {context.ring_degree} processes, each with a share of the "
        "keys, where neither maps nor bands can be had; use ulysses_degree"
    ) from error


def _run_in_graph(kind: type, processor: Any, attn: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """As `_run`, by the plan that was made before; the compiler follows this."""
    tapped = getattr(attn, SLOT, None)
    if tapped is None:
        return kind.__call__(processor, attn, *args, **kwargs)
    plan = tapped.plan
    if plan is None:
        return _run(kind, processor, attn, args, kwargs)
    if not plan.computes and not plan.requests:
        return kind.__call__(processor, attn, *args, **kwargs)
    return _under(_Planned(tapped.layer, plan), kind, processor, attn, args, kwargs)


def _under(interception: _Mode, kind: type, processor: Any, attn: nn.Module, args: tuple, kwargs: dict[str, Any]):
    with _native(processor), interception:
        result = kind.__call__(processor, attn, *args, **kwargs)
    if interception.calls == 0:
        raise ArgumentError(
            f"{interception.layer.name} cannot be captured: its processor {kind.__name__} does not call "
            "scaled_dot_product_attention; set the stock PyTorch 2 processor first"
        )
    return result


@contextmanager
def _native(processor: Any) -> Iterator[None]:
    """A processor that can choose a backend of attention (flash, sage, flex …) calls PyTorch's while we take its
    place.
    """
    if not hasattr(processor, "_attention_backend"):
        yield
        return
    own = vars(processor).get("_attention_backend", SLOT)
    vars(processor)["_attention_backend"] = _native_backend()
    try:
        yield
    finally:
        if own is SLOT:
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

    def _attention(self, number: int, disturbs: bool, given: _Given) -> Attention:
        key, value = given.key, given.value
        if given.enable_gqa:  # a head of the keys is for some of the query's, one after the other
            heads = given.query.shape[1] // key.shape[1]
            key, value = (one.repeat_interleave(heads, dim=1) for one in (key, value))
        return Attention(self.layer, number, disturbs, given.query, key, value, given.attn_mask, given.scale)

    def _check_kind(self, given: _Given) -> None:
        if given.dropout_p or given.is_causal:
            raise ArgumentError(
                f"{self.layer.name}: attention with dropout or a causal mask cannot be captured; got "
                f"dropout_p={given.dropout_p}, is_causal={given.is_causal}"
            )

    def _check_whole(self, requests: Any) -> None:
        """Refuses maps between the tokens of a video of which every process has a share."""
        if not requests or self.layer.kind == "cross":
            return
        if context_of(self.layer.module.processor) is not None:
            raise ArgumentError(
                f"{self.layer.name} attends among the video's tokens, of which every process has a share under "
                "context parallelism: its maps cannot be captured; do without them (Vico: flow='cross'), or run it on "
                "one process"
            )


class _Interception(_Mode):
    """Asks the taps at every call."""

    def __init__(self, layer: Layer, taps: list[Tap], disturbs: bool) -> None:
        super().__init__(layer)
        self.disturbs = disturbs
        self.taps = taps
        self.samples = Samples()
        self.graph = torch.is_grad_enabled()

    def compute(self, number: int, given: _Given) -> torch.Tensor | None:
        attention = self._attention(number, self.disturbs, given)
        bands = [band for tap in self.taps if (band := tap.band(attention))]
        requests = requests_of(self.taps, attention)
        if not bands and not requests and not any(tap.computes for tap in self.taps):
            return None
        self._check_whole(requests)
        if self.graph and not torch.is_grad_enabled() and (bands or requests):
            raise ArgumentError(
                f"{self.layer.name} attends in a function that has a backward pass of its own, as under context "
                "parallelism: maps and bands have no gradient there; run it on one process"
            )
        if len(bands) > 1:
            raise ArgumentError(f"{self.layer.name} is regularised by two methods at once: attach one VSTAR")
        self._check_kind(given)
        band = bands[0] if bands else {}
        out, found = attend(attention, band, requests, backend_of(self.taps, requests))
        self.samples.hand_over(attention, requests, found)
        return out


class _Planned(_Mode):
    """Does what was planned, and leaves the maps in the plan."""

    def __init__(self, layer: Layer, plan: Plan) -> None:
        super().__init__(layer)
        self.plan = plan

    def compute(self, number: int, given: _Given) -> torch.Tensor | None:
        plan = self.plan
        attention = self._attention(number, plan.disturbs, given)
        requests = plan.requests if attention.of_text else ()
        if not requests and not plan.computes:
            return None
        self._check_kind(given)
        self._check_whole(requests)
        out, found = attend(attention, {}, requests, plan.backend)
        if requests:
            plan.turn, plan.turns.taken = plan.turns.taken, plan.turns.taken + 1
            plan.found = (*plan.found, (number, found))
        return out
