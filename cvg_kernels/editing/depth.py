"""Depth of the frames of a clip, by a depth model of `transformers`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import interpolate


def estimate_depth(model: Any, frames: torch.Tensor) -> torch.Tensor:
    """Estimates the depth of frames, larger nearer.

    Args:
        model: a depth model of `transformers` that gives relative inverse depth.
        frames: `[F, 3, H, W]` in [0, 1].

    Returns:
        float32 `[F, H, W]`.
    """
    pixels = (2 * frames - 1).to(model.dtype)
    depth = model(pixel_values=pixels).predicted_depth.float()
    if depth.shape[-2:] != frames.shape[-2:]:
        depth = interpolate(depth[:, None], frames.shape[-2:], mode="bilinear")[:, 0]
    return depth
