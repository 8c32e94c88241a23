"""Reads the images that people bring, of any mode and size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import interpolate

from cvg_kernels.errors import ArgumentError


def read_image(path: str | Path) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Reads an image as float32 `[3, H, W]` in [0, 1], and what was done to it; of an animation, its first frame.

    Raises:
        ArgumentError: if it cannot be read.
    """
    from PIL import Image

    notes: dict[str, None] = {}
    if not str(path).strip() or not Path(path).is_file():
        raise ArgumentError(f"image must be a file that exists, got {str(path)!r}")
    try:
        with Image.open(path) as image:
            if getattr(image, "is_animated", False):
                notes["the first frame of the animation is taken"] = None
            return to_tensor(upright(image), notes), tuple(notes)
    except Exception as error:
        raise ArgumentError(f"image must be a picture that can be read, got {path}: {shortened(error)}") from None


def fit_square(frame: torch.Tensor, size: int, fit: Literal["crop", "pad"] = "crop") -> torch.Tensor:
    """Makes a square of a picture and resizes it.

    Args:
        frame: `[3, H, W]` in [0, 1].
        size: side of the square.
        fit: "crop" takes the square in the middle, "pad" adds black on both sides.

    Returns:
        `[3, size, size]` in [0, 1].
    """
    height, width = frame.shape[1:]
    if fit == "pad":
        side = max(height, width)
        square = frame.new_zeros(3, side, side)
        top, left = (side - height) // 2, (side - width) // 2
        square[:, top : top + height, left : left + width] = frame
    else:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = frame[:, top : top + side, left : left + side]
    if side == size:
        return square
    # larger pictures are averaged; bicubic interpolation of smaller ones may leave the range
    found = interpolate(square[None], (size, size), mode="bicubic", antialias=side > size)
    return found[0].clamp(0, 1)


def upright(image: Any) -> Any:
    """An image as its camera was held."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def to_tensor(picture: Any, notes: dict[str, None]) -> torch.Tensor:
    """A picture of any mode as float32 `[3, H, W]` in [0, 1]; what is transparent becomes black."""
    if isinstance(picture, np.ndarray):
        values = picture
    elif picture.mode.startswith(("I", "F")):  # 16 bits a pixel, or numbers of any range
        grey = np.asarray(picture).astype(np.float64)
        most = 65535.0 if picture.mode.startswith("I") else max(1.0, float(grey.max()))
        values = np.repeat((grey / most).clip(0, 1)[:, :, None], 3, 2) * 255
    else:
        if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
            rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32)
            if rgba[..., 3].min() < 255:
                notes["what is transparent is taken as black"] = None
            values = rgba[..., :3] * rgba[..., 3:] / 255
        else:
            values = np.asarray(picture.convert("RGB"))
    return torch.from_numpy(np.array(values, dtype=np.float32)).permute(2, 0, 1) / 255


def shortened(error: BaseException | str) -> str:
    """The last line of an error that says something, without the addresses of decoders."""
    lines = [re.sub(r"\[[^]]* @ 0x\w+\]", "", line).strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line]
    return lines[-1][:160] if lines else "" if isinstance(error, str) else type(error).__name__
