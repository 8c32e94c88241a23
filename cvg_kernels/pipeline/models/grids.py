"""How the tokens of a layer lie over the latents:
rules for `Model.grid`, from the latents' shape `[B, C, F, H, W]`.
"""

from __future__ import annotations

from typing import Any

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.models.model import Grid


def unet_grid(latents: tuple[int, ...], tokens: int, denoiser: Any) -> Grid:
    """Returns that of a UNet, which halves rows and columns, rounding up, down to as many tokens as the layer has."""
    frames, rows, columns = latents[2:]
    while rows * columns > tokens:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != tokens:
        raise ArgumentError(f"a layer of {tokens} tokens fits no level of latents {tuple(latents)}")
    return frames, rows, columns


def patch_grid(latents: tuple[int, ...], tokens: int, denoiser: Any) -> Grid:
    """Returns that of a transformer that cuts the latents into patches of `patch_size` = (frames, rows, columns)."""
    frames, rows, columns = (
        size // patch for size, patch in zip(latents[2:], denoiser.config.patch_size, strict=True)
    )
    return frames, rows, columns


def frame_patch_grid(latents: tuple[int, ...], tokens: int, denoiser: Any) -> Grid:
    """Returns that of a transformer with square patches of `patch_size`,
    of `patch_size_t` frames where it has that.
    """
    frames, rows, columns = latents[2:]
    patch, together = denoiser.config.patch_size, denoiser.config.get("patch_size_t") or 1
    return frames // together, rows // patch, columns // patch


def token_grid(latents: tuple[int, ...], tokens: int, denoiser: Any) -> Grid:
    """Returns that of a transformer whose latents are packed into tokens already."""
    return tuple(latents[2:])
