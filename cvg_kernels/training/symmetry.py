"""The square's symmetries as augmentation: a mirrored clip is a clip, and its directions are mirrored with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cvg_kernels.shapes.world import DIRECTIONS

#: The eight symmetries: whether rows and columns are swapped, then columns reversed, then rows reversed.
SYMMETRIES = [(swap, x, y) for swap in (False, True) for x in (False, True) for y in (False, True)]


def permutations(labels: Sequence[str]) -> torch.Tensor:
    """Number of each label's image under each symmetry, int64 `[8, labels]`; labels that are no direction stay."""
    names = {vector: name for name, vector in DIRECTIONS.items()}
    table = []
    for swap, reverse_x, reverse_y in SYMMETRIES:
        row = []
        for label in labels:
            if label in DIRECTIONS:
                x, y = DIRECTIONS[label]
                x, y = (y, x) if swap else (x, y)
                label = names[-x if reverse_x else x, -y if reverse_y else y]
            row.append(labels.index(label))
        table.append(row)
    return torch.tensor(table)


def mirrored(
    maps: torch.Tensor, labels: torch.Tensor, table: torch.Tensor, which: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies to each sample a symmetry of its own.

    Args:
        maps: `[N, …, h, w]`, square.
        labels: int64 `[N]`.
        table: table of `permutations`.
        which: number of the symmetry, int64 `[N]`.
    """
    out = torch.empty_like(maps)
    for number, (swap, reverse_x, reverse_y) in enumerate(SYMMETRIES):
        chosen = which == number
        some = maps[chosen]
        some = some.mT if swap else some
        reversed_axes = [axis for axis, wanted in ((-1, reverse_x), (-2, reverse_y)) if wanted]
        out[chosen] = some.flip(reversed_axes) if reversed_axes else some
    return out, table[which, labels]
