"""Attention among frames as the temporal layers of a denoiser call it."""

from __future__ import annotations

from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import temporal_attention


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
    if mask is not None:
        raise ArgumentError(
            f"temporal attention with a mask is not served, got one of shape {tuple(mask.shape)}"
        )
    result = temporal_attention(
        query, key, value, scale=scale, capture=capture, backend=backend, **band
    )
    return result.out, result.maps
