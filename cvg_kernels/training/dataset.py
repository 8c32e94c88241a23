"""Examples as a classifier is trained on them: one entity at a time, training and test clips apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvg_kernels.composition.features import with_context
from cvg_kernels.training.store import Examples

_TEST = 8  # one clip in so many is kept for the test


@dataclass
class Entities:
    """Examples one entity at a time; the features stay where they are."""

    examples: Examples
    places: torch.Tensor  #: int64 `[N, 2]`, example and entity

    @classmethod
    def of(cls, examples: Examples) -> Entities:
        """Every entity that has a label."""
        return cls(examples, (examples.label >= 0).nonzero())

    def __len__(self) -> int:
        return len(self.places)

    def take(self, which: torch.Tensor, chosen: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps `[n, T, 2, M, F, h, w]` and labels `[n]` of some of them, at all steps or those of numbers `chosen`."""
        example, entity = self.places[which].unbind(1)
        maps = self.examples.maps
        maps = maps[example] if chosen is None else maps[example[:, None], chosen]
        maps = maps.float()  # [n, T, E, M, F, h, w]
        steps = maps.shape[1]
        both = with_context(maps.flatten(0, 1)).unflatten(0, (-1, steps))
        labels = self.examples.label[example, entity].long()
        return both[torch.arange(len(which)), :, entity], labels


def split(examples: Examples) -> tuple[Examples, Examples]:
    """Training and test examples, by clip: both inversions of a clip are on the same side."""
    test = examples.clip % _TEST == 0
    return examples.where(~test), examples.where(test)
