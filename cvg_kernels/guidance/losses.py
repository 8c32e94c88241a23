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


def band_distance(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Squared distance of temporal attention maps to a Gaussian band, mean over rows and positions.

        mean_i Σ_j (A_ij − Â_ij)²,   Â_ij ∝ exp(−(i − j)² / 2σ²) with rows that sum to 1

    Args:
        maps: A `[B, positions, F, F]`, row = attending frame.
        sigma: width of the band in frames.

    Returns:
        `[B]`.

    The regularisation of "VSTAR: Generative Temporal Nursing" as a loss, for guidance by its gradient.
    """
    frames = torch.arange(maps.shape[-1], device=maps.device, dtype=maps.dtype)
    band = (-(frames[:, None] - frames).square() / (2 * sigma**2)).softmax(-1)
    return (maps - band).square().sum(-1).mean((1, 2))


def diagonality(maps: torch.Tensor) -> torch.Tensor:
    """How much temporal attention lies along the diagonal: Pearson's correlation of row and column under A's weights.

    Args:
        maps: A `[..., F, F]`, not negative.

    Returns:
        `[...]` in [−1, 1]; 1 for a diagonal, 0 for even attention. 0 for a single frame.
    """
    frames = torch.arange(maps.shape[-1], device=maps.device, dtype=maps.dtype)
    weights = maps / maps.sum((-2, -1), keepdim=True)
    rows, columns = weights.sum(-1), weights.sum(-2)  # marginals

    def moments(marginal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = (marginal * frames).sum(-1)
        return mean, (marginal * frames.square()).sum(-1) - mean.square()

    (row_mean, row_variance), (column_mean, column_variance) = moments(rows), moments(columns)
    together = torch.einsum("...ij,i,j->...", weights, frames, frames) - row_mean * column_mean
    spread = (row_variance * column_variance).clamp_min(torch.finfo(maps.dtype).tiny).sqrt()
    return together / spread
