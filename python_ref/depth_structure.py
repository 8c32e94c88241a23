"""Gen-1's structure: a depth map with less and less detail. The definition.

A round blurs with the binomial taps (1, 2, 1)/4 along rows and columns, reflected at the ends, and keeps every second
pixel, ⌈h/2⌉ × ⌈w/2⌉ of them; a side of one pixel stays. After t rounds the map is resized back, bilinearly. Gen-1 says
"blur and downsample" without naming the filter; the binomial one is the choice of Burt and Adelson's pyramid made
small.
"""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate, pad


def _halve(maps: torch.Tensor) -> torch.Tensor:
    """Binomial blur of rows and columns, then every second of them; a side of one pixel stays."""
    rows, columns = (int(side > 1) for side in maps.shape[2:])
    maps = pad(maps, (columns, columns, rows, rows), mode="reflect")
    if rows:
        maps = (maps[..., :-2:2, :] + 2 * maps[..., 1:-1:2, :] + maps[..., 2::2, :]) / 4
    if columns:
        maps = (maps[..., :-2:2] + 2 * maps[..., 1:-1:2] + maps[..., 2::2]) / 4
    return maps


def depth_structure(depth: torch.Tensor, rounds: int | torch.Tensor) -> torch.Tensor:
    """Depth blurred and halved t times, then resized to its own size.

    Args:
        depth: `[B, F, h, w]`.
        rounds: t, a number or integers `[B]`; 0 leaves a sample as it is.

    Returns:
        `[B, F, h, w]` in the dtype of depth; computed in float32 at least.
    """
    size = depth.shape[2:]
    level = depth.to(torch.promote_types(depth.dtype, torch.float32))
    result = level
    one = isinstance(rounds, int)
    wanted = {rounds} if one else set(rounds.tolist())
    for number in range(1, max(wanted, default=0) + 1):
        level = _halve(level)
        if number in wanted:
            resized = interpolate(level, size, mode="bilinear", align_corners=False)
            if one:
                result = resized
            else:
                chosen = (rounds == number).to(depth.device).view(-1, 1, 1, 1)
                result = torch.where(chosen, resized, result)
    return result.to(depth.dtype)
