"""Guidance as a sum of differences between predictions: the definition.

    mix = p₀ + s₁ (p₁ − p₀) + … + sₙ (pₙ − pₙ₋₁)

Classifier-free guidance is n = 1 with (unconditional, conditional); Gen-1's temporal guidance is n = 2 with (image
model, unconditional, conditional) and scales (ω_t, ω). While every scale so far is exactly 1 the sum telescopes to the
last prediction, and is taken to be it: a leading scale of 1 leaves no trace, not even in rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def guidance_mix(
    predictions: Sequence[torch.Tensor], scales: Sequence[float] | torch.Tensor, *, rescale: float = 0.0
) -> torch.Tensor:
    """p₀ + Σ s_i (p_i − p_{i−1}), computed in float32 at least.

    Args:
        predictions: n + 1 tensors `[B, …]` of one shape and dtype.
        scales: n numbers, or a tensor `[n, B]`.
        rescale: φ. With φ ≠ 0 the result is mix · (φ · std(pₙ) / std(mix) + 1 − φ), the deviations taken over all of a
            sample.

    Returns:
        `[B, …]` in the dtype of the predictions.
    """
    dtype = predictions[0].dtype
    wide = [p.to(torch.promote_types(dtype, torch.float32)) for p in predictions]
    mix, telescopes = wide[0], True
    for scale, before, after in zip(scales, wide[:-1], wide[1:], strict=True):
        if isinstance(scale, torch.Tensor):
            scale = scale.to(mix.dtype).view(-1, *[1] * (mix.ndim - 1))
            telescopes = (scale == 1) & telescopes
            # p_i + 0 · (p_i − p_{i−1}): p_i exactly, and the scale keeps its gradient.
            exact = after + (scale - 1) * (after - before)
            mix = torch.where(telescopes, exact, mix + scale * (after - before))
        else:
            telescopes = telescopes and scale == 1
            mix = after if telescopes else mix + scale * (after - before)
    if rescale:
        dims = tuple(range(1, mix.ndim))
        ratio = wide[-1].std(dims, keepdim=True) / mix.std(dims, keepdim=True)
        mix = rescale * (mix * ratio) + (1 - rescale) * mix
    return mix.to(dtype)
