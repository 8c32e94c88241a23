"""The square's symmetries as augmentation: a mirrored clip is a clip, and directions are mirrored with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Words that say which way something moves, and how it stands to another: steps to the right and down.
_MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
#: The eight symmetries: whether rows and columns are swapped, then columns reversed, then rows reversed.
SYMMETRIES = [(swap, x, y) for swap in (False, True) for x in (False, True) for y in (False, True)]


def permutations(labels: Sequence[str]) -> torch.Tensor:
    """Number of each label's image under each symmetry, int64 `[8, labels]`; labels without a direction stay."""
    return torch.tensor([[labels.index(_image(label, *one)) for label in labels] for one in SYMMETRIES])


def _image(label: str, swap: bool, reverse_x: bool, reverse_y: bool) -> str:
    for words in (_MOTIONS, _RELATIONS):
        if label in words:
            x, y = words[label]
            x, y = (y, x) if swap else (x, y)
            wanted = (-x if reverse_x else x, -y if reverse_y else y)
            return next(word for word, way in words.items() if way == wanted)
    return label


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
