"""Which rows of one text tensor are rows of another: how crops, selections and reorderings of a text are followed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

#: Per row of a text, the row of another that it is; `None` for one that is none of them, such as padding.
Rows = tuple[int | None, ...]

#: Channels by which rows are compared at first; what they find is compared in full.
_FIRST = 16


def flat(text: torch.Tensor) -> torch.Tensor:
    """A text as `[B, L, C]`, also where a model wants further axes of size 1 between."""
    return text.reshape(text.shape[0], -1, text.shape[-1])


def followed(text: torch.Tensor, source: torch.Tensor) -> Rows | None:
    """Finds the rows of a text in that which it was made of; `None` if not one of them is there.

    Rows may be left out, moved, repeated, converted to another number format, or stand beside channels of another text
    encoder; rows that are zero are padding. Among rows that are alike (of padding) the one after the last found
    counts.

    Args:
        text: `[L, C]`.
        source: `[T, D]`, with D no larger than C.
    """
    if text.shape[-1] < source.shape[-1] or not len(text) or not len(source):
        return None
    best: Rows | None = None
    for part in _parts(text, source.shape[-1]):
        rows = _equal_rows(part, source.to(part.device).to(part.dtype))
        if best is None or _count(rows) > _count(best):
            best = rows
    return best if _count(best) else None


def _parts(text: torch.Tensor, channels: int) -> Iterator[torch.Tensor]:
    """Where the channels of a source may be among those of a text: first, last, or every so many."""
    yield text[:, :channels]
    if text.shape[1] > channels:
        yield text[:, -channels:]
        if text.shape[1] % channels == 0:
            yield text[:, :: text.shape[1] // channels]


def _equal_rows(text: torch.Tensor, source: torch.Tensor) -> Rows:
    first = (text[:, None, :_FIRST] == source[None, :, :_FIRST]).all(-1)
    full = [index for index, zero in enumerate((text == 0).all(-1).tolist()) if not zero]
    candidates = first.cpu()
    rows: list[int | None] = [None] * len(text)
    after = 0
    for index in full:
        alike = candidates[index].nonzero().flatten().tolist()
        alike.sort(key=lambda row: (row != after, row))
        rows[index] = next((row for row in alike if torch.equal(text[index], source[row])), None)
        after = after if rows[index] is None else rows[index] + 1
    return tuple(rows)


def _count(rows: Rows | None) -> int:
    return 0 if rows is None else sum(row is not None for row in rows)


class Marks:
    """Rows that can be told apart after any change of scale and shift: each has its own signs around its mean."""

    CHANNELS = 64

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._codes: list[torch.Tensor] = []
        self.count = 0

    def take(self, samples: int, tokens: int) -> torch.Tensor:
        """New rows `[samples, tokens, CHANNELS]` of ones, half of them negative."""
        noise = torch.rand(samples * tokens, self.CHANNELS, generator=self._generator)
        codes = torch.where(noise.argsort(1) < self.CHANNELS // 2, 1.0, -1.0)
        self._codes.append(codes)
        self.count += len(codes)
        return codes.view(samples, tokens, self.CHANNELS)

    def find(self, text: torch.Tensor) -> Rows:
        """Numbers of the rows that were handed out, 0 first, in a text `[L, C]` made of them."""
        codes = torch.cat(self._codes)
        best: Rows = ()
        for part in _parts(text.float(), self.CHANNELS):
            signs = (part - part.mean(-1, keepdim=True)).sign()
            agreement, nearest = (signs @ codes.T).max(-1)
            known = agreement == self.CHANNELS
            rows = tuple(a if k else None for a, k in zip(nearest.tolist(), known.tolist(), strict=True))
            if _count(rows) > _count(best):
                best = rows
        return best


def among(rows: Sequence[int | None], start: int, length: int) -> Rows:
    """Rows by their place in one of several sources that were numbered through.

    Args:
        rows: numbers in all sources.
        start: number of the source's first row.
        length: length of the source.
    """
    return tuple(token - start if token is not None and start <= token < start + length else None for token in rows)
