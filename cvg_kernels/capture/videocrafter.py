"""The temporal attention of VideoCrafter's own code and its kin (lvdm), which is no diffusers model.

Their `TemporalTransformer` brings each position's frames together, `(b h w) f c`, and calls `CrossAttention` modules with
projections `to_q`, `to_k`, `to_v`, `to_out`. `TemporalCrossAttention` stands in for such a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import temporal_attention

#: Number of positions in a call → options of `temporal_attention` for it.
Band = Callable[[int], dict[str, Any]]
#: Gets the maps `[P, F, F]` of a call.
Sink = Callable[[torch.Tensor], None]

_PARTS = ("to_q", "to_k", "to_v", "to_out")


class TemporalCrossAttention(nn.Module):
    """Computes what a temporal `CrossAttention` computes, by `temporal_attention`.

    It has the module's own projections under their names, so parameters and state dicts stay what they are:

        block.attn1 = TemporalCrossAttention(block.attn1, band=lambda positions: {"sigma": 1.0})

    Args:
        attention: with `to_q`, `to_k`, `to_v`, `to_out`, `heads` and `scale`, attending among the frames of each position.
        band: the options of `temporal_attention` (sigma, strength, bias) for a call of so many positions; `None`: none.
        sink: gets the maps of every call, mean over heads, attached to the graph; `None` captures nothing.
        backend: of the operation.

    Raises:
        ArgumentError: for a module with other parts, or with relative positions, which are not served.
    """

    def __init__(
        self,
        attention: nn.Module,
        band: Band | None = None,
        sink: Sink | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        missing = [name for name in (*_PARTS, "heads", "scale") if not hasattr(attention, name)]
        if missing:
            raise ArgumentError(
                f"attention must have {', '.join(missing)}, got {type(attention).__name__} without"
            )
        if getattr(attention, "relative_position", False):
            raise ArgumentError("attention must have no relative positions, got a module with them")
        for name in _PARTS:
            setattr(self, name, getattr(attention, name))
        self.heads, self.scale = attention.heads, attention.scale
        self.band, self.sink, self.backend = band, sink, backend

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention among the frames of every position.

        Args:
            x: `[P, F, C]`.
            context: what keys and values are made of; only `x` itself (`None`) is served.
            mask: must be `None`.

        Raises:
            ArgumentError: for a context or a mask.
        """
        if mask is not None or (context is not None and context is not x):
            raise ArgumentError(
                "temporal attention with a context or a mask is not served, got "
                + ("a mask" if mask is not None else "a context")
            )
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [P, heads, F, D]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        band = {} if self.band is None else self.band(x.shape[0])
        capture = self.sink is not None
        out, maps = temporal_attention(
            query, key, value, scale=self.scale, capture=capture, backend=self.backend, **band
        )
        if capture:
            self.sink(maps)
        return self.to_out(out.transpose(1, 2).flatten(-2))


def temporal_cross_attentions(network: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of every `TemporalTransformer` in a network, by name, in their order.

    Raises:
        ArgumentError: if there is none.
    """
    inside = [
        name
        for name, module in network.named_modules()
        if type(module).__name__ == "TemporalTransformer"
    ]
    found = {
        name: module
        for name, module in network.named_modules()
        if all(hasattr(module, part) for part in _PARTS)
        and any(name.startswith(f"{place}." if place else "") for place in inside)
    }
    if not found:
        raise ArgumentError(
            f"{type(network).__name__} has no TemporalTransformer with attention modules inside"
        )
    return found


@contextmanager
def standing_in(network: nn.Module, others: dict[str, nn.Module]) -> Iterator[None]:
    """Puts modules in the places of others for the length of a `with` block, whatever happens in it.

    Args:
        network: that has the places.
        others: name of the place → what stands there meanwhile.
    """
    before = {name: network.get_submodule(name) for name in others}

    def put(modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, module)

    try:
        put(others)
        yield
    finally:
        put(before)
