"""Depth of the frames of a clip, by a depth model of `transformers`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate

from cvg_kernels.errors import ArgumentError, check_flag, is_whole

#: Distances are taken to be at least this share of the clip's largest before they are inverted: a pixel that is
#: estimated at 0 would else leave all others black.
_NEAREST = 0.01
#: Sides of frames that a network without patches can take.
_MULTIPLES = {"glpn": 32}


@torch.no_grad()
def estimate_depth(
    model: Any, frames: torch.Tensor, processor: Any = None, *, distance: bool | None = None, chunk: int = 8
) -> torch.Tensor:
    """Estimates the depth of frames, larger nearer, whatever the model gives.

    Models that give nearness (MiDaS, Depth Anything) are taken as they are; of distances d it is 1 / max(d, d_max /
    100) with the clip's largest distance d_max. Frames are estimated one by one, so a relative model may flicker.

    Args:
        model: a depth model of `transformers`.
        frames: `[F, 3, H, W]` in [0, 1].
        processor: the image processor of the model; `None` gives it the frames in [−1, 1], in the nearest size it can
            take.
        distance: whether the model gives distances; `None` lets its configuration say (`gives_distance`).
        chunk: frames that go through the model at a time.

    Returns:
        float32 `[F, H, W]` on the device of frames.

    Raises:
        ArgumentError: if an argument does not fit, or the model gives what is no depth.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.is_floating_point() or not len(frames):
        raise ArgumentError(f"frames must be floating point [F, 3, H, W], got {frames.dtype} {tuple(frames.shape)}")
    if not is_whole(chunk, 1):
        raise ArgumentError(f"chunk must be a whole number of at least 1, got {chunk!r}")
    if distance is None:
        distance = gives_distance(model, processor)
    check_flag("distance", distance)
    estimate = _plainly if processor is None else _by_processor
    parts = [estimate(model, part, processor) for part in frames.split(chunk)]
    depth = torch.cat(parts).to(frames.device)
    if not bool(depth.isfinite().all()):
        raise ArgumentError(f"model {type(model).__name__} gave infinite depth or NaN")
    if not distance:
        return depth
    farthest = depth.max()
    if farthest <= 0:
        raise ArgumentError(
            f"model {type(model).__name__} gave no positive distance: give distance=False if it tells nearness"
        )
    return 1 / depth.clamp_min(_NEAREST * farthest)


def gives_distance(model: Any, processor: Any = None) -> bool:
    """Tells whether a model gives distances (metres) or nearness, from its configuration.

    Distances: ZoeDepth, GLPN, TIPSv2, Depth Anything where its `depth_estimation_type` is "metric", DPT on DINOv2
    (`add_projection`, the checkpoints for NYU and KITTI), and Depth Pro once its processor has inverted what it gives.
    Nearness: DPT as MiDaS trained it, Depth Anything else, and Depth Pro itself.

    Args:
        model: a model of `transformers`.
        processor: that its output goes through, if any.

    Raises:
        ArgumentError: for a model of which it is not known.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind in ("zoedepth", "glpn", "tipsv2_dpt"):
        return True
    if kind in ("depth_anything", "prompt_depth_anything"):
        return getattr(config, "depth_estimation_type", "relative") == "metric"
    if kind == "dpt":
        return bool(getattr(config, "add_projection", False))
    if kind == "depth_pro":
        return processor is not None
    raise ArgumentError(
        f"distance must be given for {type(model).__name__}: True if it gives distances, False if larger is nearer"
    )


def load_depth_model(source: Any, device: torch.device | None = None) -> tuple[Any, Any]:
    """Finds a depth model and its image processor.

    Args:
        source: the folder of a saved model; the name of a model on the Hub, which is downloaded if it is not in the
            cache (and not under `HF_HUB_OFFLINE=1`); a `transformers` pipeline for depth estimation; a pair (model,
            processor), where `None` for the processor stands for a network that takes frames in [−1, 1]; or a model
            alone that was loaded from a place where its processor is found without a download.
        device: where a model that is loaded here is put.

    Returns:
        (model, processor).

    Raises:
        ArgumentError: if nothing of that kind is given, or it cannot be loaded.
    """
    if isinstance(source, (str, os.PathLike)):
        return _loaded(source, device)
    if isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], nn.Module):
        return source[0], source[1]
    if isinstance(source, nn.Module):
        return source, _processor_of(source)
    model = getattr(source, "model", None)
    processor = getattr(source, "image_processor", None)
    if isinstance(model, nn.Module) and processor is not None:
        return model, processor
    raise ArgumentError(
        "depth_model must be a depth model of transformers, a pair (model, image processor), a depth-estimation "
        f"pipeline, or the folder or name of one, got {type(source).__name__}"
    )


def _loaded(source: str | os.PathLike, device: torch.device | None) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    local = Path(source).is_dir()
    if not local and (isinstance(source, os.PathLike) or str(source).startswith((".", "/", "~"))):
        raise ArgumentError(f"depth_model must be the folder of a saved model, got {str(source)!r}")
    try:
        model = AutoModelForDepthEstimation.from_pretrained(source, local_files_only=local)
        processor = AutoImageProcessor.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ArgumentError(f"depth_model {str(source)!r} cannot be loaded: {error}") from error
    return model.eval().to(device), processor


def _processor_of(model: nn.Module) -> Any:
    """The processor that lies beside a model, on disk or in the cache."""
    from transformers import AutoImageProcessor

    place = getattr(model, "name_or_path", "")
    try:
        if place:
            return AutoImageProcessor.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        pass  # said below, with what helps
    raise ArgumentError(
        f"depth_model must come with its image processor, which is not beside {type(model).__name__} "
        f"({place or 'not loaded from anywhere'}): give the pair (model, processor), or (model, None) for one that "
        "takes frames in [-1, 1]"
    )


def _plainly(model: Any, frames: torch.Tensor, _: Any) -> torch.Tensor:
    """Without a processor: in [−1, 1], the sides rounded to what the network's patches divide."""
    size = frames.shape[-2:]
    fitting = _fitting(model, size)
    if fitting != tuple(size):
        frames = interpolate(frames, fitting, mode="bilinear", antialias=True)
    pixels = (2 * frames - 1).to(model.device, model.dtype)
    depth = model(pixel_values=pixels).predicted_depth.float()
    if depth.shape[-2:] != size:
        depth = interpolate(depth[:, None], size, mode="bilinear")[:, 0]
    return depth


def _fitting(model: Any, size: Sequence[int]) -> tuple[int, ...]:
    """The size nearest to that of the frames which a network can take."""
    config = getattr(model, "config", None)
    kind, backbone = getattr(config, "model_type", None), getattr(config, "backbone_config", None)
    if config is not None and kind == "dpt" and (backbone is None or config.is_hybrid):
        return (config.image_size,) * 2  # MiDaS' own takes squares only
    patches = (getattr(part, "patch_size", None) for part in (backbone, config))
    whole = [int(one) for one in patches if one is not None and is_whole(one, 1)]
    patch = whole[0] if whole else _MULTIPLES.get(kind or "", 1)
    return tuple(max(patch, round(side / patch) * patch) for side in size)


def _by_processor(model: Any, frames: torch.Tensor, processor: Any) -> torch.Tensor:
    """By the model's own processor, as the pipeline of transformers goes through it."""
    from PIL import Image

    bytes_ = (255 * frames).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(frame) for frame in bytes_]
    try:
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        output = model(pixel_values=pixels.to(model.device, model.dtype))
        sizes = [tuple(frames.shape[-2:])] * len(frames)
        processed = processor.post_process_depth_estimation(output, sizes)
    except (ImportError, NameError) as error:  # some processors are written for torchvision
        raise ArgumentError(
            f"processor {type(processor).__name__} cannot run here, it may need torchvision: {error}"
        ) from error
    return torch.stack([one["predicted_depth"].float().reshape(sizes[0]) for one in processed])
