"""Losses on token scores."""

from __future__ import annotations

import torch


def fairness_loss(peaks: torch.Tensor, kind: str = "min") -> torch.Tensor:
    """How unequally the tokens are seen, one value per sample.

    Args:
        peaks: A `[B, K]`, the score of each word.
        kind: `"min"`: max_k max(0, 1 − A_k), which raises the weakest word (Vico, paper eq. 4 and released code);
            `"variance"`: Σ_k (A_k − Ā)² (the paper's ablation).

    Returns:
        `[B]`.
    """
    if kind == "min":
        return (1 - peaks).clamp_min(0).amax(1)
    return (peaks - peaks.mean(1, keepdim=True)).square().sum(1)
