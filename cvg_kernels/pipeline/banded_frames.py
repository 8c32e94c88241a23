"""Maps between frames under VSTAR's band on attention that spans the video, by the maps without one.

    S'_ij = scale · q_i · k_j + m_i · strength · G(f_i, f_j),   m_i = max_j scale · q_i · k_j

is a product again, of queries and keys with a number more for each frame: q_i beside m_i · strength / scale · G(f_i,
·), and k_j beside the unit vector of its frame.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from cvg_kernels.ops import first_highest_keys
from cvg_kernels.pipeline.models import Grid


class Banded(NamedTuple):
    """Queries and keys of the video alone, `[B, heads, F·h·w, D + F]`, whose product has the band in it."""

    query: torch.Tensor
    key: torch.Tensor


def banded_video(
    query: torch.Tensor, key: torch.Tensor, grid: Grid, begin: int, scale: float, band: dict[str, Any], backend: str
) -> Banded:
    """Makes them, in float32 at least; differentiable, through m too.

    Args:
        query: `[B, heads, N, D]` of all tokens.
        key: `[B, heads, N, D]`.
        grid: (F, h, w) of the video.
        begin: where it begins among the tokens.
        scale: factor of the logits.
        band: options of `frame_band_attention`.
        backend: which implementation of the operations to use.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    place = first_highest_keys(query, key, scale=scale, backend=backend)
    video = slice(begin, begin + math.prod(grid))
    query, chosen = (query[:, :, video].to(wide), place[:, :, video, None].expand(-1, -1, -1, key.shape[3]))
    highest = scale * (query * key.gather(2, chosen)).sum(-1, keepdim=True)
    if not band.get("row_max_grad", True):
        highest = highest.detach()
    frames = torch.arange(grid[0], device=query.device, dtype=wide)
    near = (-(frames[:, None] - frames).square() / (2 * band["sigma"] ** 2)).exp()
    places = grid[1] * grid[2]
    near = (band.get("strength", 1.0) / scale * near).repeat_interleave(places, 0)
    unit = torch.eye(grid[0], device=query.device, dtype=wide).repeat_interleave(places, 0)
    key = key[:, :, video].to(wide)
    return Banded(torch.cat([query, highest * near], -1), torch.cat([key, unit.expand(*key.shape[:2], -1, -1)], -1))
