"""Attention among frames as the layers of a denoiser call it: temporal layers, and attention over a whole video."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import pad

from cvg_kernels.capture.layers import Grid
from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import FrameBandAttention, frame_band_attention, temporal_attention


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
    backend: str,
    *,
    frames: torch.Tensor,
    **band: Any,
) -> FrameBandAttention:
    """Attention over all tokens of a video, with or without those of a text, with a band by frame distance.

    Args:
        query: `[B, H, N, D]`; key and value likewise.
        key: see `query`.
        value: see `query`.
        mask: must be `None`.
        scale: factor of the logits.
        backend: of the operation.
        frames: the frame of each token, as `token_frames` gives it.
        band: further options of `frame_band_attention`: sigma and strength.

    Raises:
        ArgumentError: for a mask.
    """
    _refuse_mask("attention over a video", mask)
    return frame_band_attention(
        query, key, value, frames, frames, scale=scale, backend=backend, **band
    )


def token_frames(grid: Grid, tokens: int, device: torch.device) -> torch.Tensor:
    """The frame of each token, int32 `[tokens]`; −1 for the tokens of a text, which come before those of the video.

    Args:
        grid: (F, h, w), filled frame by frame.
        tokens: how many there are.
        device: of the result.

    Raises:
        ArgumentError: if there are too few for the grid.
    """
    text = tokens - math.prod(grid)
    if text < 0:
        raise ArgumentError(f"a layer of {tokens} tokens cannot hold a video of {grid}")
    frames = torch.arange(grid[0], dtype=torch.int32, device=device)
    return pad(frames.repeat_interleave(grid[1] * grid[2]), (text, 0), value=-1)


def text_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    token_ids: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Maps `[B, H, K, N]` of text tokens in `video_layer`: exp(S − lse), since their logits S have no band.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        lse: `[B, H, N]`, of the attention with its band.
        token_ids: `[B, K]`, of text tokens.
        scale: factor of the logits.
    """
    chosen = key.take_along_dim(token_ids[:, None, :, None], dim=2)  # [B, H, K, D]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * (chosen.to(lse.dtype) @ query.to(lse.dtype).mT)
    return (logits - lse[:, :, None]).exp()


def _refuse_mask(what: str, mask: torch.Tensor | None) -> None:
    if mask is not None:
        raise ArgumentError(
            f"{what} with a mask is not served, got one of shape {tuple(mask.shape)}"
        )
