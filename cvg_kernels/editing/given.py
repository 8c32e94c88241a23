"""What a call of `StructureContentPipeline` is given, checked and made into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from cvg_kernels.editing.structure import MOST_ROUNDS
from cvg_kernels.errors import ArgumentError, is_whole

_OUTPUTS = ("pil", "np", "pt", "latent")
#: What diffusers' own processors of images raise.
_REFUSED = (ValueError, TypeError, IndexError, RuntimeError, AttributeError)


def check_call(
    video: Any, prompt: Any, image: Any, structure: Any, depth: Any, output_type: Any
) -> None:
    """Checks that there is structure and content, and the values of settings.

    Raises:
        ArgumentError: for what does not fit.
    """
    if video is None and depth is None:
        raise ArgumentError("video or depth must be given, got neither")
    if prompt is None and image is None:
        raise ArgumentError("prompt or image must be given, got neither")
    if not is_whole(structure, 0) or structure > MOST_ROUNDS:
        raise ArgumentError(
            f"structure must be a whole number from 0 to {MOST_ROUNDS}, got {structure!r}"
        )
    if output_type not in _OUTPUTS:
        raise ArgumentError(
            f"output_type must be one of {', '.join(_OUTPUTS)}, got {output_type!r}"
        )


def common_count(**counts: int) -> int:
    """How many clips are made: each of the arguments is for one of them, or for all.

    Args:
        **counts: name of an argument → how many it gives.

    Raises:
        ArgumentError: if two arguments give different numbers, neither of them one.
    """
    batch = max(counts.values())
    for name, count in counts.items():
        if count not in (1, batch):
            raise ArgumentError(f"{name} must be one or one for each of {batch} clips, got {count}")
    return batch


def texts_in(prompt: str | Sequence[str] | None) -> int:
    """How many texts are given; none counts as one for all clips."""
    return 1 if prompt is None or isinstance(prompt, str) else len(prompt)


def images_in(image: Any) -> int:
    """How many images are given; none counts as one for all clips."""
    if isinstance(image, (list, tuple)):
        return len(image)
    return len(image) if getattr(image, "ndim", 3) == 4 else 1


def clips_of(processor: Any, video: Any, size: tuple[int, int]) -> torch.Tensor:
    """Makes clips `[B, F, 3, H, W]` in [0, 1].

    Args:
        processor: a `diffusers.video_processor.VideoProcessor`.
        video: as somebody gave it.
        size: height and width of the result.

    Raises:
        ArgumentError: if it is no video.
    """
    try:
        if getattr(video, "ndim", 4) not in (4, 5):
            raise ValueError(f"{video.ndim} dimensions")
        pixels = processor.preprocess_video(_in_unit_range("video", video), *size)
    except ArgumentError:
        raise
    except _REFUSED as error:
        raise ArgumentError(
            "video must be frames of one size (PIL images, arrays [F, H, W, 3], tensors [F, 3, H, W] in [0, 1]) or a "
            f"batch of such, got {_described(video)}: {error}"
        ) from None
    if pixels.shape[1] != 3:
        raise ArgumentError(f"video must have 3 colour channels, got {pixels.shape[1]}")
    return (pixels.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)


def pictures_of(processor: Any, image: Any, batch: int) -> torch.Tensor:
    """Makes images `[batch, 3, H, W]` in [0, 1].

    Args:
        processor: a `diffusers.video_processor.VideoProcessor`.
        image: as somebody gave it.
        batch: how many clips there are; one image is for all of them.

    Raises:
        ArgumentError: if it is no image.
    """
    try:
        pixels = processor.preprocess(_in_unit_range("image", image))
    except ArgumentError:
        raise
    except _REFUSED as error:
        raise ArgumentError(
            f"image must be one image or one a clip, got {_described(image)}: {error}"
        ) from None
    if len(pixels) not in (1, batch) or pixels.shape[1] != 3:
        raise ArgumentError(
            f"image must have 3 colour channels, one or one for each of {batch} clips, got {tuple(pixels.shape)}"
        )
    return (pixels.float() / 2 + 0.5).clamp(0, 1).expand(batch, -1, -1, -1)


def depth_of(depth: Any, clips: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
    """Makes depth `[B, F, H, W]` of the size of the frames.

    Args:
        depth: as somebody gave it.
        clips: `[B, F, 3, H, W]`, whose depth it is; `None` if only depth is given.
        size: height and width of the result.

    Raises:
        ArgumentError: if it is no depth, or not that of the clips.
    """
    if not torch.is_tensor(depth) or depth.ndim not in (3, 4) or not depth.numel():
        raise ArgumentError(
            f"depth must be a tensor [F, H, W] or [B, F, H, W], got {_described(depth)}"
        )
    depth = depth.float() if depth.ndim == 4 else depth.float()[None]
    if not bool(depth.isfinite().all()):
        raise ArgumentError("depth must be finite, got infinite numbers or NaN")
    if clips is not None and depth.shape[:2] != clips.shape[:2]:
        raise ArgumentError(
            f"depth must have the clips and frames of video, {tuple(clips.shape[:2])}, got {tuple(depth.shape[:2])}"
        )
    return interpolate(depth, size, mode="bilinear", antialias=True)


def _in_unit_range(name: str, value: Any) -> Any:
    """Bytes as numbers in [0, 1]; pictures of other kinds, and lists of them, as they are.

    Raises:
        ArgumentError: for numbers outside [0, 1], which the processors of diffusers would clip or take for others.
    """
    if isinstance(value, (list, tuple)):
        return [_in_unit_range(name, one) for one in value]
    if not isinstance(value, (torch.Tensor, np.ndarray)):
        return value
    if value.dtype in (torch.uint8, np.uint8):
        return value / np.float32(255) if isinstance(value, np.ndarray) else value / 255
    real = value.is_floating_point() if torch.is_tensor(value) else value.dtype.kind == "f"
    if not real:
        raise ArgumentError(f"{name} must be bytes or numbers in [0, 1], got {value.dtype}")
    low, high = (float(value.min()), float(value.max())) if 0 not in value.shape else (0.0, 0.0)
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN is neither
        raise ArgumentError(f"{name} must have numbers in [0, 1], got {low:.3g} to {high:.3g}")
    return value.clip(0, 1)


def _described(value: Any) -> str:
    """What somebody gave, in short."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} {tuple(shape)}"
    if isinstance(value, (list, tuple)):
        return (
            f"a {type(value).__name__} of {len(value)} {type(value[0]).__name__}"
            if value
            else "an empty list"
        )
    return type(value).__name__
