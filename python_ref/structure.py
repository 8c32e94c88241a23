"""Gen-1's structure: a depth map with less and less detail. The definition.

A round blurs with the binomial taps (1, 2, 1)/4 along rows and columns, reflected at the ends, and keeps every second
pixel, ⌈h/2⌉ × ⌈w/2⌉ of them; a side of one pixel stays. After t rounds the map is resized back, bilinearly. Gen-1 says
"blur and downsample" without naming the filter; the binomial one is the choice of Burt and Adelson's pyramid made small.
"""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate


def _halve(maps: torch.Tensor, dim: int) -> torch.Tensor:
    """Binomial blur along one dimension, then every second pixel of it."""
    size = maps.shape[dim]
    if size == 1:
        return maps
    kept = torch.arange(0, size, 2, device=maps.device)
    left = maps.index_select(dim, (kept - 1).abs())
    right = maps.index_select(dim, size - 1 - (size - 2 - kept).abs())
    return (left + 2 * maps.index_select(dim, kept) + right) / 4


def depth_structure(depth: torch.Tensor, rounds: int | torch.Tensor) -> torch.Tensor:
    """Depth blurred and halved t times, then resized to its own size.

    Args:
        depth: `[B, F, h, w]`.
        rounds: t, a number or integers `[B]`; 0 leaves a sample as it is.

    Returns:
        `[B, F, h, w]` in the dtype of depth; computed in float32 at least.
    """
    per_sample = torch.as_tensor(rounds, device=depth.device).expand(depth.shape[0])
    size = depth.shape[2:]
    level = depth.to(torch.promote_types(depth.dtype, torch.float32))
    result = level
    for number in range(1, int(per_sample.max()) + 1 if len(per_sample) else 1):
        level = _halve(_halve(level, 2), 3)
        back = interpolate(level, size, mode="bilinear", align_corners=False)
        result = torch.where((per_sample == number).view(-1, 1, 1, 1), back, result)
    return result.to(depth.dtype)
