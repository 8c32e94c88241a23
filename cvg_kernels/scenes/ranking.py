"""How well one number tells apart: average precision of a map, and rank statistics within prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_RESAMPLES = 1000


def average_precision(scores: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean precision at each wanted place, the places in order of falling score; ties share their mean order.

    Args:
        scores: scores of any shape.
        wanted: bool, of that shape, true somewhere.
    """
    order = scores.flatten().argsort(descending=True, stable=True)
    ranked = scores.flatten()[order].double()
    hits = wanted.flatten()[order].double()
    # a block of equal scores is taken at once: what is in it is found at its end
    ends = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    found = hits.cumsum(0)[ends]
    precision = found / (ends + 1)
    return float((precision * found.diff(prepend=found.new_zeros(1))).sum() / hits.sum())


def best_iou(scores: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest intersection over union of `scores ≥ threshold` with the wanted places, over all thresholds."""
    order = scores.flatten().argsort(descending=True, stable=True)
    ranked, hits = scores.flatten()[order], wanted.flatten()[order].double()
    ends = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    found = hits.cumsum(0)[ends]
    return float((found / (ends + 1 + hits.sum() - found)).max())


def within_prompt_auc(values: Sequence[np.ndarray], shown: Sequence[np.ndarray]) -> dict[str, Any]:
    """How often a number is larger where a thing is shown than where it is not, among clips of one prompt.

    All pairs of one clip that shows a thing and one of the same prompt that does not; ties count half. The interval is
    that of prompts drawn anew.

    Args:
        values: per prompt, `[clips, things]`.
        shown: per prompt, bool `[clips, things]`.

    Returns:
        `auc`, `ci95` (both `None` without a pair) and `pairs`.
    """
    wins, pairs = [], []
    for number, is_shown in zip(values, shown, strict=True):
        won, of = 0.0, 0
        for thing in range(is_shown.shape[1]):
            yes, no = number[is_shown[:, thing], thing], number[~is_shown[:, thing], thing]
            above = np.sign(yes[:, None] - no[None]) / 2 + 0.5
            won, of = won + float(above.sum()), of + above.size
        wins.append(won)
        pairs.append(of)
    wins_, pairs_ = np.array(wins), np.array(pairs)
    if not pairs_.sum():
        return {"auc": None, "ci95": None, "pairs": 0}
    drawn = np.random.default_rng(0).integers(len(wins_), size=(_RESAMPLES, len(wins_)))
    total = pairs_[drawn].sum(1)
    again = wins_[drawn].sum(1)[total > 0] / total[total > 0]
    low, high = np.quantile(again, [0.025, 0.975])
    auc = float(wins_.sum() / pairs_.sum())
    return {"auc": auc, "ci95": [float(low), float(high)], "pairs": int(pairs_.sum())}
