"""Vico's score of a token: where it stands out most among the tokens, after smoothing. The definition."""

from __future__ import annotations

import torch


def _smooth(volume: torch.Tensor, dim: int, sigma: float) -> torch.Tensor:
    """Three-tap Gaussian along one dimension, reflected at the ends; a dimension of size 1 reflects onto itself."""
    size = volume.shape[dim]
    # Attend-and-Excite's kernel, which Vico keeps: exp(−((x − μ) / 2σ)²), normalised.
    side = torch.exp(torch.tensor(-1 / (2 * sigma) ** 2, dtype=volume.dtype, device=volume.device))
    before = torch.arange(size, device=volume.device) - 1
    after = torch.arange(size, device=volume.device) + 1
    before[0] = min(1, size - 1)
    after[-1] = max(size - 2, 0)
    neighbours = volume.index_select(dim, before) + volume.index_select(dim, after)
    return (volume + side * neighbours) / (1 + 2 * side)


def token_peaks(flow: torch.Tensor, *, sharpness: float = 100.0, sigma: float = 0.5) -> torch.Tensor:
    """Softmax over tokens, Gaussian over frames and space, maximum:  A_k = max (G₃ₓ₃ₓ₃ ∗ softmax_K(sharpness ·
    flow))_k.

    Args:
        flow: `[B, K, F, h, w]`.
        sharpness: factor before the softmax over the K tokens.
        sigma: width of the Gaussian, whose taps are exp(−(x / 2σ)²).

    Returns:
        `[B, K]`, in [0, 1].
    """
    share = (sharpness * flow).softmax(1)
    for dim in (2, 3, 4):
        share = _smooth(share, dim, sigma)
    return share.amax((2, 3, 4))
