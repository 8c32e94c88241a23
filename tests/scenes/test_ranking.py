"""Average precision, best IoU and the rank statistic within prompts, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cvg_kernels.scenes.ranking import average_precision, best_iou, within_prompt_auc


def by_definition(scores: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Over every threshold that is a score."""
    precision, iou, before = 0.0, 0.0, 0
    for threshold in scores.unique().flip(0):
        taken = scores >= threshold
        found = int((taken & wanted).sum())
        precision += found / int(taken.sum()) * (found - before) / int(wanted.sum())
        iou = max(iou, found / int((taken | wanted).sum()))
        before = found
    return precision, iou


@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "no-ties"])
def test_maps_against_the_definition(levels):
    for _ in range(10):
        scores = torch.randint(levels, (4, 5, 6)).float()
        wanted = torch.rand(4, 5, 6) < 0.3
        wanted[0, 0, 0] = True
        precision, iou = by_definition(scores, wanted)
        assert average_precision(scores, wanted) == pytest.approx(precision)
        assert best_iou(scores, wanted) == pytest.approx(iou)


def test_perfect_and_even_maps():
    wanted = torch.tensor([True, False, False, True])
    assert average_precision(wanted.float(), wanted) == best_iou(wanted.float(), wanted) == 1
    assert average_precision(torch.ones(4), wanted) == best_iou(torch.ones(4), wanted) == 0.5


def test_only_clips_of_one_prompt_are_compared():
    """A number that differs between prompts alone tells nothing."""
    shown = [np.array([[True], [False], [True]]), np.array([[False], [False], [True]])]
    told = within_prompt_auc([np.full((3, 1), 5.0), np.full((3, 1), 1.0)], shown)
    assert told["auc"] == 0.5 and told["pairs"] == 4
    right = within_prompt_auc([one.astype(float) for one in shown], shown)
    assert right["auc"] == 1 and right["ci95"] == [1, 1]
    assert within_prompt_auc([np.ones((2, 1))], [np.array([[True], [True]])])["auc"] is None
