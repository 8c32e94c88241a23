"""One call of `temporal_maps` as its backends take it: the video's tokens by place, and where the gradients go.

    forward(call) -> maps
    backward(call, grad_maps, targets)                fills those that are there

All that a backend is given and fills are views of the caller's tensors: `[B, P, H, F, …]`, places first. Tokens that
are not of the video it never sees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cvg_kernels.reference.temporal_maps import by_place


class MapsCall(NamedTuple):
    """The arguments, checked. `wide` is float32, or float64 for a float64 query."""

    query: torch.Tensor  #: `[B, P, H, F, D]`, any strides, as key
    key: torch.Tensor
    lse: torch.Tensor | None  #: wide `[B, P, H, F]`, any strides; `None`: maps are of the frames alone
    key_bias: torch.Tensor | None  #: wide `[B, P, F]`, any strides, −∞ where a key is not seen
    scale: float
    head_mean: bool  #: maps are averaged over the heads

    @property
    def maps_shape(self) -> tuple[int, ...]:
        """`[B, P, F, F]`, or `[B, H, P, F, F]`."""
        batch, places, heads, frames, _ = self.query.shape
        return (batch, *(() if self.head_mean else (heads,)), places, frames, frames)


class Targets(NamedTuple):
    """Where gradients are written, `None` where one is not wanted: views as those of the call."""

    query: torch.Tensor | None
    key: torch.Tensor | None
    lse: torch.Tensor | None


class Video(NamedTuple):
    """Where the video's tokens lie among all."""

    frames: int
    places: int  #: of a frame
    query_start: int
    key_start: int

    def call(self, query, key, lse, key_bias, scale: float, head_mean: bool) -> MapsCall:
        """The call on tensors `[B, H, N, …]`, the bias `[B, M]`."""
        frames, places = self.frames, self.places
        if key_bias is not None:
            key_bias = by_place(key_bias[:, None], frames, places, self.key_start)[:, :, 0]
        return MapsCall(
            self.of_queries(query),
            by_place(key, frames, places, self.key_start),
            None if lse is None else self.of_queries(lse),
            key_bias,
            scale,
            head_mean,
        )

    def of_queries(self, tokens: torch.Tensor) -> torch.Tensor:
        """What belongs to the queries of the video, by place."""
        return by_place(tokens, self.frames, self.places, self.query_start)
