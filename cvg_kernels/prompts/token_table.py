"""The tokens of the words of several prompts as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.prompts.tokens import TokenSpan


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The tokens of each prompt's words, padded to the most that a prompt has; made by `of`.

    Attributes:
        ids: int64 `[B, T]`, positions in the text encoder's sequence, each once; padded with the prompt's first.
        real: bool `[B, T]`, whether a column is one of the prompt's tokens and no padding.
        membership: float32 `[B, K, T]`, 1 where a token belongs to a word; a token may belong to several.
        present: bool `[B, K]`, whether the prompt has so many words.
        labels: per prompt, the names of its words.
        columns: int64 `[B, K, M]`, the columns of each word's tokens, padded with 0.
        counted: bool `[B, K, M]`, which of `columns` are no padding.
    """

    ids: torch.Tensor
    real: torch.Tensor
    membership: torch.Tensor
    present: torch.Tensor
    labels: tuple[tuple[str, ...], ...]
    columns: torch.Tensor
    counted: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[Sequence[TokenSpan]], among: Sequence[Sequence[int]] | None = None) -> TokenTable:
        """Lays out the words of some prompts, on the host.

        Args:
            spans: per prompt, its words.
            among: per prompt, the tokens that `ids` shall have, those of the words among them; by default only those.

        Raises:
            ArgumentError: for a word whose tokens are not among them.
        """
        if among is None:
            among = [list(dict.fromkeys(token for span in each for token in span.ids)) for each in spans]
        tokens = max((len(each) for each in among), default=0)
        words = max((len(each) for each in spans), default=0)
        most = max((len(span.ids) for each in spans for span in each), default=1)
        ids = torch.zeros(len(spans), tokens, dtype=torch.int64)
        real = torch.zeros(len(spans), tokens, dtype=torch.bool)
        membership = torch.zeros(len(spans), words, tokens)
        columns = torch.zeros(len(spans), words, most, dtype=torch.int64)
        counted = torch.zeros(len(spans), words, most, dtype=torch.bool)
        present = torch.zeros(len(spans), words, dtype=torch.bool)
        for sample, (each, own) in enumerate(zip(spans, among, strict=True)):
            if len(own):
                ids[sample] = own[0]
                ids[sample, : len(own)] = torch.tensor(own)
                real[sample, : len(own)] = True
            column = {token: place for place, token in enumerate(own)}
            for k, span in enumerate(each):
                if not column.keys() >= set(span.ids):
                    raise ArgumentError(f"among must hold the tokens {span.ids} of {span.label!r}, got {tuple(own)}")
                places = torch.tensor([column[token] for token in span.ids], dtype=torch.int64)
                membership[sample, k, places] = 1
                columns[sample, k, : len(places)] = places
                counted[sample, k, : len(places)] = True
                present[sample, k] = True
        labels = tuple(tuple(span.label for span in each) for each in spans)
        return cls(ids, real, membership, present, labels, columns, counted)

    def by_word(self, maps: torch.Tensor, dim: int = -4) -> torch.Tensor:
        """Sums maps over the tokens of each word: out[b, …, k, …] = Σ_t membership[b, k, t] · maps[b, …, t, …].

        The sum is taken in float32, or float64 if the maps are, also under autocast. A word that a prompt does not
        have gets zeros.

        Args:
            maps: `[B, T, F, h, w]` or, per head, `[B, heads, T, F, h, w]`; other forms with `dim`.
            dim: axis of the tokens.

        Returns:
            The same form with K words for T tokens.
        """
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        each = self._tokens_of_words(maps, dim, 0)
        return torch.stack(each).sum(0) if len(each) > 1 else each[0]

    def largest_by_word(self, values: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The largest value among the tokens of each word, −∞ for a word that a prompt does not have.

        Args:
            values: `[B, T]`, or another form with `dim`.
            dim: axis of the tokens.

        Returns:
            The same form with K words for T tokens.
        """
        return torch.stack(self._tokens_of_words(values, dim, -torch.inf)).amax(0)

    def places(self) -> list[list[list[int]]]:
        """Positions of the tokens of each word in the text encoder's sequence, per prompt."""
        return [
            [ids[row.bool()].tolist() for row, is_present in zip(words, present, strict=True) if is_present]
            for ids, words, present in zip(self.ids, self.membership, self.present, strict=True)
        ]

    def repeat(self, times: int) -> TokenTable:
        """The table of several branches one after the other, each with all prompts."""
        return self._changed(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)), times)

    def to(self, device: torch.device | str) -> TokenTable:
        """The table on a device; `check_reach` wants `ids` on the host, so check before."""
        return self._changed(lambda tensor: tensor.to(device), 1)

    def _tokens_of_words(self, values: torch.Tensor, dim: int, other: float) -> list[torch.Tensor]:
        """The first token of every word, the second and so on; `other` where a word has no more."""
        dim %= values.ndim
        samples, tokens = self.ids.shape
        if (values.shape[0], values.shape[dim]) != (samples, tokens):
            raise ArgumentError(
                f"maps must have {samples} sample(s) and, on axis {dim}, {tokens} token(s), got {tuple(values.shape)}"
            )
        shape = [samples, *[1] * (dim - 1), self.present.shape[1], *[1] * (values.ndim - dim - 1)]
        size = [*values.shape[:dim], self.present.shape[1], *values.shape[dim + 1 :]]
        taken = []
        for columns, counted in zip(self.columns.unbind(-1), self.counted.unbind(-1), strict=True):
            index = columns.to(values.device).view(shape).expand(size)
            kept = counted.to(values.device).view(shape)
            taken.append(torch.where(kept, values.gather(dim, index), other))
        return taken

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor], times: int) -> TokenTable:
        tensors = {name: one for name, one in vars(self).items() if torch.is_tensor(one)}
        changed = {name: change(one) for name, one in tensors.items()}
        return replace(self, **changed, labels=self.labels * times)
