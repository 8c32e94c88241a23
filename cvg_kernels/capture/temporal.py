"""Attention among frames as the layers of a denoiser call it: temporal layers, and self-attention over a whole video."""

from __future__ import annotations

from typing import Any

import torch

from cvg_kernels.capture.layers import Grid
from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import frame_band_attention, temporal_attention


def temporal_layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    band: dict[str, Any],
    backend: str,
    *,
    capture: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and, if captured, maps `[P, F, F]` of a temporal layer.

    Args:
        query: `[P, H, F, D]`; key and value likewise.
        key: see `query`.
        value: see `query`.
        mask: must be `None`: no temporal layer of diffusers masks frames.
        scale: factor of the logits.
        band: options of `temporal_attention`: sigma and strength, or nothing.
        backend: of the operation.
        capture: whether to return the maps.

    Raises:
        ArgumentError: for a mask.
    """
    _refuse_mask("temporal attention", mask)
    result = temporal_attention(
        query, key, value, scale=scale, capture=capture, backend=backend, **band
    )
    return result.out, result.maps


def video_layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    grid: Grid,
    band: dict[str, Any],
    backend: str,
) -> torch.Tensor:
    """Output of self-attention over all tokens of a video, with a band by frame distance.

    Args:
        query: `[B, H, F·h·w, D]`, frame by frame; key and value likewise.
        key: see `query`.
        value: see `query`.
        mask: must be `None`.
        scale: factor of the logits.
        grid: (F, h, w).
        band: options of `frame_band_attention`: sigma and strength.
        backend: of the operation.

    Raises:
        ArgumentError: for a mask, or tokens that do not fill the grid.
    """
    _refuse_mask("self-attention over a video", mask)
    frames = torch.arange(grid[0], dtype=torch.int32, device=query.device)
    frames = frames.repeat_interleave(grid[1] * grid[2])
    return frame_band_attention(
        query, key, value, frames, frames, scale=scale, backend=backend, **band
    ).out


def _refuse_mask(what: str, mask: torch.Tensor | None) -> None:
    if mask is not None:
        raise ArgumentError(
            f"{what} with a mask is not served, got one of shape {tuple(mask.shape)}"
        )
