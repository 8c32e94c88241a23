"""What a call of `StructureContentPipeline` is given, checked and made into tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from cvg_kernels.editing.structure import MOST_ROUNDS
from cvg_kernels.errors import ArgumentError, GuidanceWarning, is_whole

_OUTPUTS = ("pil", "np", "pt", "latent")
#: What diffusers' own processors of images raise.
_REFUSED = (ValueError, TypeError, IndexError, RuntimeError, AttributeError)


def check_call(
    *,
    video: Any,
    prompt: Any,
    image: Any,
    depth: Any,
    negative_prompt: Any,
    structure: Any,
    num_inference_steps: Any,
    guidance_scale: Any,
    output_type: Any,
) -> None:
    """Checks that there is structure and content, and the values of settings; warns of what has no effect.

    Raises:
        ArgumentError: for what does not fit.
    """
    if video is None and depth is None:
        raise ArgumentError("video or depth must be given, got neither")
    if prompt is None and image is None:
        raise ArgumentError("prompt or image must be given, got neither")
    if not is_whole(structure, 0) or structure > MOST_ROUNDS:
        raise ArgumentError(f"structure must be a whole number from 0 to {MOST_ROUNDS}, got {structure!r}")
    if not is_whole(num_inference_steps, 1):
        raise ArgumentError(f"num_inference_steps must be a whole number of at least 1, got {num_inference_steps!r}")
    number = isinstance(guidance_scale, (int, float)) and not isinstance(guidance_scale, bool)
    if not (number and math.isfinite(guidance_scale)):
        raise ArgumentError(f"guidance_scale must be a finite number, got {guidance_scale!r}")
    if negative_prompt is not None and guidance_scale <= 1:
        warnings.warn(
            f"negative_prompt has no effect: guidance_scale must be above 1 for it, got {guidance_scale!r}",
            GuidanceWarning,
            stacklevel=4,
        )
    if output_type not in _OUTPUTS:
        raise ArgumentError(f"output_type must be one of {', '.join(_OUTPUTS)}, got {output_type!r}")


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


def check_callback(callback: Any, shown: Any, known: Sequence[str]) -> None:
    """Checks what is called after a step, and the names of what it is shown.

    Raises:
        ArgumentError: if it cannot be called, or the pipeline has nothing of such a name.
    """
    if callback is not None and not callable(callback):
        raise ArgumentError(f"callback_on_step_end must be a function, got {_described(callback)}")
    if isinstance(shown, str) or any(name not in known for name in shown):
        raise ArgumentError(
            f"callback_on_step_end_tensor_inputs must be a list of names among {', '.join(known)}, got {shown!r}"
        )


def check_generator(generator: Any, batch: int) -> None:
    """Checks that there is one generator, or one a clip.

    Raises:
        ArgumentError: for anything else but `None`.
    """
    several = isinstance(generator, (list, tuple))
    for one in generator if several else [generator]:
        if not isinstance(one, torch.Generator) and (several or one is not None):
            raise ArgumentError(f"generator must be a torch.Generator or one for each clip, got {_described(one)}")
    if several and len(generator) != batch:
        raise ArgumentError(f"generator must be one or one for each of {batch} clips, got {len(generator)}")


def texts_of(name: str, prompt: str | Sequence[str] | None) -> list[str] | None:
    """Makes texts a list; `None` stays.

    Args:
        name: name of the argument.
        prompt: as somebody gave it.

    Raises:
        ArgumentError: if it is no text.
    """
    if prompt is None:
        return None
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
        raise ArgumentError(f"{name} must be a text or a list of texts, got {prompt!r}")
    return list(texts)


def texts_in(prompt: Sequence[str] | None) -> int:
    """How many texts are given; none counts as one for all clips."""
    return 1 if prompt is None else len(prompt)


def images_in(image: Any) -> int:
    """How many images are given; none counts as one for all clips."""
    if isinstance(image, (list, tuple)):
        return len(image)
    return len(image) if getattr(image, "ndim", 3) == 4 else 1


def clips_of(video: Any, size: tuple[int, int]) -> torch.Tensor:
    """Makes clips `[B, F, 3, H, W]` in [0, 1], resized alike whatever they were given as, and cut where they are too
    wide.

    The processors of diffusers resize pictures of PIL smoothly and tensors by the nearest pixel, and squeeze both.

    Args:
        video: as somebody gave it.
        size: height and width of the result.

    Raises:
        ArgumentError: if it is no video.
    """
    from diffusers.video_processor import VideoProcessor

    try:
        if getattr(video, "ndim", 4) not in (4, 5):
            raise ValueError(f"{video.ndim} dimensions")
        pixels = VideoProcessor(do_resize=False).preprocess_video(_in_unit_range("video", video))
    except ArgumentError:
        raise
    except _REFUSED as error:
        raise ArgumentError(
            "video must be frames of one size (PIL images, arrays [F, H, W, 3], tensors [F, 3, H, W] in [0, 1]) or a "
            f"batch of such, got {_described(video)}: {error}"
        ) from None
    if pixels.shape[1] != 3:
        raise ArgumentError(f"video must have 3 colour channels, got {pixels.shape[1]}")
    clips = (pixels.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)
    return cropped(clips.flatten(0, 1), size).unflatten(0, clips.shape[:2])


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
        raise ArgumentError(f"image must be one image or one a clip, got {_described(image)}: {error}") from None
    if len(pixels) not in (1, batch) or pixels.shape[1] != 3:
        raise ArgumentError(
            f"image must have 3 colour channels, one or one for each of {batch} clips, got {tuple(pixels.shape)}"
        )
    return (pixels.float() / 2 + 0.5).clamp(0, 1).expand(batch, -1, -1, -1)


def depth_of(depth: Any, clips: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
    """Makes depth `[B, F, H, W]` of the size of the frames, cut as they are.

    Args:
        depth: as somebody gave it.
        clips: `[B, F, 3, H, W]`, whose depth it is; `None` if only depth is given.
        size: height and width of the result.

    Raises:
        ArgumentError: if it is no depth, or not that of the clips.
    """
    given = depth
    depth = torch.from_numpy(depth) if _is_numbers(depth) else depth
    if not torch.is_tensor(depth) or depth.ndim not in (3, 4) or not depth.numel():
        raise ArgumentError(f"depth must be a tensor or array [F, H, W] or [B, F, H, W], got {_described(given)}")
    depth = depth.float() if depth.ndim == 4 else depth.float()[None]
    if not bool(depth.isfinite().all()):
        raise ArgumentError("depth must be finite, got infinite numbers or NaN")
    if clips is not None and depth.shape[:2] != clips.shape[:2]:
        raise ArgumentError(
            f"depth must have the clips and frames of video, {tuple(clips.shape[:2])}, got {tuple(depth.shape[:2])}"
        )
    return cropped(depth, size)


def cropped(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scales frames `[F, C, H, W]` until they cover a size, and cuts off what is over, on both sides alike."""
    high, wide = frames.shape[-2:]
    if (high, wide) == tuple(size):
        return frames
    scale = max(size[0] / high, size[1] / wide)
    scaled = [max(math.ceil(side * scale - 1e-6), least) for side, least in zip((high, wide), size, strict=True)]
    if scaled != [high, wide]:
        frames = interpolate(frames, scaled, mode="bilinear", antialias=True)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return frames[..., top : top + size[0], left : left + size[1]]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiu"


def _coloured(name: str, picture: Any) -> Any:
    """A picture of PIL as RGB; what is transparent becomes white, as in `Gen1(content=…)`.

    Raises:
        ArgumentError: if it has more than 8 bits a pixel and channel, whose range nobody knows.
    """
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        raise ArgumentError(
            f"{name} must be pictures of 8 bits a channel, got one of mode {picture.mode}: give arrays in [0, 1]"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _in_unit_range(name: str, value: Any) -> Any:
    """Bytes as numbers in [0, 1], pictures of PIL in colour, lists of either; the rest as it is.

    Raises:
        ArgumentError: for numbers outside [0, 1], which the processors of diffusers would clip or take for others.
    """
    if hasattr(value, "has_transparency_data"):
        return _coloured(name, value)
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
    """Says in short what somebody gave."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} {tuple(shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)} {type(value[0]).__name__}" if value else "an empty list"
    return type(value).__name__
