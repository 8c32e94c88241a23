"""Clips, images and depth in whatever form they are given, made one form; and the way back to images."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from cvg_kernels.errors import ArgumentError


def clip_frames(video: Any) -> torch.Tensor:
    """Makes a clip a tensor.

    Args:
        video: PIL images; arrays `[F, H, W, 3]`; a tensor `[F, 3, H, W]`; or a list of arrays or tensors of single
            frames. Floating point in [0, 1], or bytes.

    Returns:
        float32 `[F, 3, H, W]` in [0, 1].

    Raises:
        ArgumentError: for anything else.
    """
    if isinstance(video, (list, tuple)):
        if not video:
            raise ArgumentError("video must have at least one frame, got an empty list")
        frames = [_picture("video", frame) for frame in video]
        sizes = sorted({tuple(frame.shape[-2:]) for frame in frames})
        if len(sizes) > 1:
            raise ArgumentError(f"video must have frames of one size, got {sizes}")
        return torch.stack(frames)
    if not isinstance(video, (torch.Tensor, np.ndarray)) or video.ndim != 4 or not len(video):
        raise ArgumentError(
            "video must be one clip: PIL images, an array [F, H, W, 3] or a tensor [F, 3, H, W], got "
            f"{type(video).__name__} {tuple(getattr(video, 'shape', ()))}".rstrip(" ()")
        )
    return torch.stack([_picture("video", frame) for frame in video])


def to_images(content: Any) -> tuple[Any, ...]:
    """Makes images RGB images of PIL; what is transparent becomes white.

    Args:
        content: an image, or several: PIL images, paths, arrays `[H, W, 3]`, tensors `[3, H, W]`.

    Raises:
        ArgumentError: for anything else, or a file that cannot be read.
    """
    several = isinstance(content, (list, tuple)) or getattr(content, "ndim", 3) == 4
    found = list(content) if several else [content]
    if not found:
        raise ArgumentError("content must be at least one image, got none")
    return tuple(to_pil(_picture("content", one)[None])[0] for one in found)


def depth_maps(depth: Any) -> torch.Tensor:
    """Makes depth a tensor.

    Args:
        depth: a tensor or an array `[F, H, W]`, or a list of `[H, W]`, or of grey PIL images; larger is nearer.

    Returns:
        float32 `[F, H, W]`.

    Raises:
        ArgumentError: for anything else, or for NaN.
    """
    if isinstance(depth, (list, tuple)):
        maps = [torch.as_tensor(np.asarray(one).astype(np.float32)) for one in depth]
        if len({tuple(one.shape) for one in maps}) != 1:
            shapes = sorted({tuple(one.shape) for one in maps})
            raise ArgumentError(f"depth must have maps of one size, got {shapes}")
        depths = torch.stack(maps)
    elif isinstance(depth, (torch.Tensor, np.ndarray)):
        depths = torch.as_tensor(depth).detach().float()
    else:
        raise ArgumentError(f"depth must be a tensor [F, H, W], got {type(depth).__name__}")
    if depths.ndim != 3 or 0 in depths.shape:
        raise ArgumentError(f"depth must be [F, H, W] of one clip, got {tuple(depths.shape)}")
    if not bool(depths.isfinite().all()):
        raise ArgumentError("depth must be finite, got infinite numbers or NaN")
    return depths


def to_pil(frames: torch.Tensor) -> list[Any]:
    """Frames `[F, 3, H, W]` in [0, 1] as RGB images of PIL."""
    from PIL import Image

    pixels = (255 * frames).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(frame) for frame in pixels]


def grey_pictures(maps: torch.Tensor) -> list[Any]:
    """Maps `[F, H, W]` in [0, 1] as RGB images of PIL, all channels alike."""
    return to_pil(maps[:, None].expand(-1, 3, -1, -1))


def _picture(name: str, given: Any) -> torch.Tensor:
    """One image `[3, H, W]` in [0, 1]."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(given, (str, os.PathLike)):
        try:
            with Image.open(given) as image:
                image.load()
                given = image
        except (OSError, UnidentifiedImageError) as error:
            raise ArgumentError(f"{name} {str(given)!r} cannot be read: {error}") from None
    if isinstance(given, Image.Image):
        if given.mode in ("RGBA", "LA", "PA") or "transparency" in given.info:
            given = given.convert("RGBA")
            white = Image.new("RGBA", given.size, "white")
            given = Image.alpha_composite(white, given)
        given = np.array(given.convert("RGB"))
    if isinstance(given, np.ndarray):
        given = torch.as_tensor(given)
        given = given.movedim(-1, 0) if given.ndim == 3 else given
    if not torch.is_tensor(given) or given.ndim != 3 or given.shape[0] != 3 or 0 in given.shape:
        shape = f" {tuple(given.shape)}" if torch.is_tensor(given) else ""
        raise ArgumentError(
            f"{name} must hold images: of PIL, arrays [H, W, 3] or tensors [3, H, W], got "
            f"{type(given).__name__}{shape}"
        )
    if given.dtype == torch.uint8:
        return given.float() / 255
    fits = given.is_floating_point() and bool(((given >= 0) & (given <= 1)).all())  # not NaN
    if not fits:
        raise ArgumentError(f"{name} must have floating point numbers in [0, 1], or bytes")
    return given.detach().float()
