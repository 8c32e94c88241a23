"""Taps: what takes part in an attention layer's computation while the layer's own processor runs.

Nothing of a processor's body is copied. A processor with taps is given a class derived from its own, which while it runs
hands calls of `torch.nn.functional.scaled_dot_product_attention` to the taps; projections, norms, rotary embeddings and
everything else stay the model's own, in whatever diffusers release is installed. To diffusers it is the processor that it
was: of the same class, with the same attributes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.attention import Attention, MapRequest, attend
from cvg_kernels.pipeline.exchange import plain
from cvg_kernels.pipeline.layers import Layer, give_processor
from cvg_kernels.pipeline.models import Grid
from cvg_kernels.pipeline.parallel import context_of

_SLOT = "_cvg_taps"  # of an attention module
_SDPA = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in {
            "query": None,
            "key": None,
            "value": None,
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": False,
            "scale": None,
            "enable_gqa": False,
        }.items()
    ]
)


class Tap:
    """Takes part in a layer's attention; subclasses say in what.

    Attributes:
        backend: which implementation of the operations to use.
        computes: whether the attention is computed by our kernels even if nothing is wanted of it: the drop-in swap.
    """

    backend: str = "auto"
    computes: bool = False

    def active(self) -> bool:
        """Whether the tap may want something of the layer now; if none does, the layer runs as ever."""
        return True

    def band(self, attention: Attention) -> dict[str, Any]:
        """The options of `temporal_attention` or `frame_band_attention` that regularise the layer; empty: none."""
        return {}

    def maps(self, attention: Attention) -> MapRequest | None:
        """The maps that are wanted of the layer, or `None`."""
        return None


@dataclass
class _Tapped:
    """The taps of one layer."""

    layer: Layer
    taps: list[Tap]
    #: (intercepting processor, the one that it was made of) of every processor that the layer has had meanwhile.
    made: list[tuple[Any, Any]]

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # a copy of the layer has none

    def intercept(self) -> None:
        """Gives the present processor the derived class, if it has it not."""
        module = self.layer.module
        for intercepting, stock in self.made:
            if module.processor is intercepting:
                return
            if module.processor is stock:
                give_processor(module, intercepting)
                return
        self.made.append((_intercepting(module.processor), module.processor))
        give_processor(module, self.made[-1][0])

    def release(self) -> None:
        """Gives the layer the processor that it would have without us."""
        module = self.layer.module
        for intercepting, stock in self.made:
            if module.processor is intercepting:
                give_processor(module, stock)


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
        return _run(kind, self, attn, args, kwargs)

    def __reduce_ex__(self, protocol: int) -> Any:  # copies are stock processors
        return plain(self, kind, {}).__reduce_ex__(protocol)

    members = {
        "__call__": __call__,
        "__class__": property(lambda self: kind),
        "__reduce_ex__": __reduce_ex__,
    }
    return type(kind.__name__, (kind,), members)


@torch.compiler.disable(
    reason="attention by cvg_kernels runs uncompiled: compile without fullgraph=True"
)
def _run(kind: type, processor: Any, attn: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """The processor's own call, its attention handed to the active taps."""
    tapped = vars(attn).get(_SLOT)
    taps = [tap for tap in tapped.taps if tap.active()] if tapped else []
    if not taps:
        return kind.__call__(processor, attn, *args, **kwargs)
    disturbs = kind.__name__.startswith("PAG")
    interception = _Interception(tapped.layer, taps, disturbs)
    with _native(processor), interception:
        try:
            result = kind.__call__(processor, attn, *args, **kwargs)
        except ValueError as error:
            _refuse_ring(processor, interception, error)
            raise
    if interception.calls == 0:
        raise ArgumentError(
            f"{tapped.layer.name} cannot be captured: its processor {kind.__name__} does not call "
            "scaled_dot_product_attention; set the stock PyTorch 2 processor first"
        )
    return result


def _refuse_ring(processor: Any, interception: _Interception, error: ValueError) -> None:
    """Says why PyTorch's attention cannot stand in for a ring of processes, each with a share of the keys."""
    context = context_of(processor)
    if context is None or context.ring_degree == 1 or interception.calls:
        return
    raise ArgumentError(
        f"{interception.layer.name} attends by a ring of {context.ring_degree} processes, each with a share of the keys, "
        "where neither maps nor bands can be had; use ulysses_degree"
    ) from error


@contextmanager
def _native(processor: Any) -> Iterator[None]:
    """A processor that can choose a backend of attention (flash, sage, flex …) calls PyTorch's while we take its place."""
    if not hasattr(processor, "_attention_backend"):
        yield
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    own = vars(processor).get("_attention_backend", _SLOT)
    vars(processor)["_attention_backend"] = AttentionBackendName.NATIVE
    try:
        yield
    finally:
        if own is _SLOT:
            del vars(processor)["_attention_backend"]
        else:
            vars(processor)["_attention_backend"] = own


class _Interception(TorchFunctionMode):
    """Hands scaled dot-product attention to taps and leaves every other function alone."""

    def __init__(self, layer: Layer, taps: list[Tap], disturbs: bool) -> None:
        super().__init__()
        self.disturbs = disturbs
        self.layer = layer
        self.taps = taps
        self.calls = 0
        self._graph = torch.is_grad_enabled()
        self._parts: dict[
            int, list[torch.Tensor]
        ] = {}  # of each tap, in a layer that attends sample by sample

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _SDPA.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        key, value = given["key"], given["value"]
        if given[
            "enable_gqa"
        ]:  # each head of the keys for some of the query's, one after the other
            key, value = (_for_all_heads(one, given["query"].shape[1]) for one in (key, value))
        attention = Attention(
            self.layer, given["query"], key, value, given["attn_mask"], given["scale"], self.calls,
            self.disturbs,
        )  # fmt: skip
        self.calls += 1
        bands = [band for tap in self.taps if (band := tap.band(attention))]
        requests = [
            self._of_all_samples(at, request)
            for at, tap in enumerate(self.taps)
            if (request := tap.maps(attention))
        ]
        computing = [tap for tap in self.taps if tap.computes]
        if not bands and not requests and not computing:
            return func(*args, **kwargs)
        if self._graph and not torch.is_grad_enabled() and (bands or requests):
            raise ArgumentError(
                f"{self.layer.name} attends in a function that has a backward pass of its own, as under context "
                "parallelism: maps and bands have no gradient there; run it on one process"
            )
        if len(bands) > 1:
            raise ArgumentError(
                f"{self.layer.name} is regularised by two methods at once: attach one VSTAR"
            )
        if given["dropout_p"] or given["is_causal"]:
            raise ArgumentError(
                f"{self.layer.name}: attention with dropout or a causal mask cannot be captured; got "
                f"dropout_p={given['dropout_p']}, is_causal={given['is_causal']}"
            )
        chosen = [part.backend for part in (*self.taps, *requests)]
        backend = next((backend for backend in chosen if backend != "auto"), "auto")
        return attend(attention, bands[0] if bands else {}, requests, backend)

    def _of_all_samples(self, tap: int, request: MapRequest) -> MapRequest:
        """A request for one sample as part of that for all, where a layer attends sample by sample."""
        if self.layer.text_call is not None:
            return request
        parts = self._parts.setdefault(tap, [])

        def receive(maps: torch.Tensor, grid: Grid) -> None:
            parts.append(maps)
            if len(parts) == request.geometry.latents[0]:
                request.receive(torch.cat(parts), grid)

        return replace(request, receive=receive)


def _for_all_heads(keys: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values of grouped heads, repeated for each head of the query."""
    return keys.repeat_interleave(heads // keys.shape[1], dim=1)
