"""A classifier small enough for tests, for the offline pipelines."""

from __future__ import annotations

import torch

from cvg_kernels.capture.layers import denoisers_of
from cvg_kernels.composition import CompositionClassifier, Selection
from cvg_kernels.composition.fingerprint import fingerprint

LABELS = ("left", "right", "up")


def tiny_classifier(pipe, timesteps, grid=(4, 3, 4), **options) -> CompositionClassifier:
    """Random weights; the statistics are about those of attention to one of 14 tokens."""
    denoiser = denoisers_of(pipe)[0]
    selection = Selection.of(denoiser, grid)
    torch.manual_seed(1)
    made = CompositionClassifier(
        LABELS, selection, timesteps, fingerprint(denoiser, selection.layers),
        aggregator={"channels": 4, "width": 8, "depth": 1, "heads": 2},
        **{"backbone": {"kind": "small-video-net", "width": 4}, **options},
    )  # fmt: skip
    made.aggregator.mean.fill_(0.15)
    made.aggregator.spread.fill_(0.02)
    return made.eval()
