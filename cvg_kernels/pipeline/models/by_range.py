"""Denoisers that are not in the table: what their user says of them."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from cvg_kernels.errors import ArgumentError, is_whole
from cvg_kernels.pipeline.models.model import Grid, Layers, Model

#: The argument that holds the latents, as denoisers of diffusers name it.
_LATENTS = ("hidden_states", "sample")


@dataclass(frozen=True)
class TextRange:
    """Where the text stands among the keys, and how the tokens of the video lie, in every layer that has both.

    Attributes:
        text: the keys of the text.
        grid: frames, rows, columns of the video's tokens.
    """

    text: slice
    grid: Grid

    def begins(self, keys: int) -> int:
        """Where the text begins in a layer of so many keys."""
        return self.text.indices(keys)[0]

    def holds(self, queries: int, keys: int) -> bool:
        """Whether a layer has the text among its keys, and the video, or a frame of it, as its queries.

        Args:
            queries: tokens that attend.
            keys: tokens that are attended to; as many as the video's are taken for the video itself.
        """
        begin, end, _ = self.text.indices(keys)
        video = math.prod(self.grid)
        if end <= begin or (self.text.stop or 0) > keys:
            return False
        if queries == keys:
            return queries >= video + end - begin
        return queries == video or self.per_frame(queries)

    def per_frame(self, queries: int) -> bool:
        """Whether a layer sees the frames one by one."""
        return queries == self.grid[1] * self.grid[2] and self.grid[0] > 1

    def video_begins(self, queries: int) -> int:
        """Where the video begins among the queries: right before the text, or behind all else if that is first."""
        video, text = math.prod(self.grid), self.begins(queries)
        return text - video if queries > video and text >= video else queries - video


def _is_empty(text: slice) -> bool:
    """Whether a range has nothing in it however many keys there are."""
    if text.stop is None:
        return False
    start = text.start or 0
    return (start < 0) == (text.stop < 0) and start >= text.stop


def model_by_range(denoiser: nn.Module, text: Any, grid: Any) -> Model:
    """Makes the entry of a denoiser of which the user says where the text stands and how the video lies.

    Args:
        denoiser: the network.
        text: the keys of the text, as a slice.
        grid: frames, rows, columns.

    Raises:
        ArgumentError: if one of them is missing or no such thing, or the denoiser has no argument for latents.
    """
    kind = type(denoiser).__name__
    if not isinstance(text, slice) or text.step not in (None, 1) or _is_empty(text):
        raise ArgumentError(
            f"text must be the range of the keys that are the text's in the layers of {kind}, such as slice(0, 226) "
            f"or slice(-256, None), got {text!r}"
        )
    numbers = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(numbers) != 3 or not all(is_whole(n, 1) for n in numbers):
        raise ArgumentError(
            f"grid must be the frames, rows and columns of the video's tokens in the layers of {kind}, got {grid!r}"
        )
    named = [name for name in _LATENTS if name in inspect.signature(denoiser.forward).parameters]
    if not named:
        raise ArgumentError(f"denoiser must take its latents as one of {', '.join(_LATENTS)}, which {kind} does not")
    return Model(
        lambda latents, tokens, network: numbers,
        (Layers("", "cross"),),
        latents=named[0],
        batched_branches=False,
        range=TextRange(text, numbers),
    )
