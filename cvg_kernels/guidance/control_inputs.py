"""Structure and content as the pipelines that can take them are called: arguments, prepared;
no pipeline is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cvg_kernels.editing.depth import estimate_depth, load_depth_model
from cvg_kernels.editing.given import cropped
from cvg_kernels.editing.structure import structure_maps
from cvg_kernels.errors import ArgumentError, is_whole
from cvg_kernels.guidance.pictures import clip_frames, depth_maps, grey_pictures, to_pil
from cvg_kernels.pipeline.models import denoisers_of
from cvg_kernels.pipeline.signatures import naming_signature
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


@dataclass(frozen=True)
class Wanted:
    """What is to be prepared.

    Attributes:
        structure: t_s, or `None` for no structure.
        content: PIL images; empty for no content.
        video: the clip whose structure is kept.
        depth: depth of the clip, instead of an estimate.
        depth_model: estimates it; see `load_depth_model`.
        distance: what that gives; see `estimate_depth`.
        height: height of the clip to be made; `None` takes that of the clip given, as does `width`.
        width: likewise.
        frame_indices: which frames SparseCtrl is told about.
    """

    structure: int | None
    content: Sequence[Any]
    video: Any = None
    depth: Any = None
    depth_model: Any = None
    distance: bool | None = None
    height: int | None = None
    width: int | None = None
    frame_indices: Sequence[int] | None = None


def check_takes(pipe: VideoPipeline, structure: int | None, content: Sequence[Any]) -> None:
    """Checks that a pipeline can take what is wanted.

    Args:
        pipe: a diffusers pipeline.
        structure: t_s, or `None` for no structure.
        content: images, or none.

    Raises:
        ArgumentError: if it cannot; says which can, and what is to be loaded.
    """
    kind = _kind(pipe)
    name = _name(pipe)
    if structure is not None:
        if kind is None:
            raise ArgumentError(
                f"structure must be None on {name}, which takes no depth of frames; those that do: {', '.join(_KINDS)}"
            )
        if hasattr(getattr(pipe, "controlnet", None), "nets"):
            raise ArgumentError(
                f"structure must be None on a {name} with several ControlNets, since any may be for depth: put "
                " structure_frames(depth, t_s) into conditioning_frames yourself"
            )
    if content and (kind is None or kind.content is None):
        if "ip_adapter_image" not in naming_signature(type(pipe), "__call__", "prompt").parameters:
            raise ArgumentError(
                f"content must be None on {name}, which takes no image; those that do: StructureContentPipeline, "
                "WanVACEPipeline, and pipelines with ip_adapter_image, such as those of AnimateDiff"
            )
        adapters = _adapters(pipe)
        if adapters != 1:
            raise ArgumentError(
                f"content must be None on a {name} with {adapters or 'no'} IP-Adapters: it takes content by exactly "
                "one, pipe.load_ip_adapter(...)"
            )
        if getattr(pipe, "image_encoder", None) is None:
            raise ArgumentError(
                f"content must be None on a {name} without an image_encoder, which makes the adapter's embeddings: "
                "load the adapter with one, or give the pipeline ip_adapter_image_embeds yourself"
            )


def check_given(pipe: VideoPipeline, structure: int | None, content: Sequence[Any], given: dict[str, Any]) -> None:
    """Checks that a pipeline was called with what was prepared for it, which it would else make its clip without.

    Args:
        pipe: that is called.
        structure: t_s, or `None`.
        content: images, or none.
        given: the arguments of the call, by name.

    Raises:
        ArgumentError: if an argument is missing.
    """
    kind = _kind(pipe)
    missing = []
    if structure is not None and kind is not None and given.get(kind.structure) is None:
        missing.append((f"structure={structure}", kind.structure))
    level = given.get("structure")  # of an editor, the level itself; others are given frames
    if structure is not None and level not in (None, structure):
        raise ArgumentError(f"structure must be that of the Gen1 that is attached, {structure}, got {level!r}")
    if content:
        takes = ("ip_adapter_image", "ip_adapter_image_embeds")
        takes = takes if kind is None or kind.content is None else (kind.content,)
        if all(given.get(name) is None for name in takes):
            missing.append(("content", takes[0]))
    if missing:
        dials = " and ".join(dial for dial, _ in missing)
        names = " and ".join(name for _, name in missing)
        raise ArgumentError(
            f"{names} must be given to {_name(pipe)} where Gen1 with {dials} is attached: call "
            "pipe(prompt, **gen1.inputs(pipe, ...))"
        )


def control_inputs(pipe: VideoPipeline, wanted: Wanted) -> dict[str, Any]:
    """Prepares the arguments of a pipeline's call.

    Args:
        pipe: a diffusers pipeline that can take what is wanted.
        wanted: what that is.

    Raises:
        ArgumentError: if it cannot, or an argument does not fit.
    """
    check_takes(pipe, wanted.structure, wanted.content)
    kind = _kind(pipe)
    arguments: dict[str, Any] = {}
    if wanted.structure is not None and kind is not None:
        if wanted.frame_indices is not None and kind.make is not _sparse:
            raise ArgumentError(
                f"frame_indices must be None on {_name(pipe)}: they are for AnimateDiffSparseControlNetPipeline"
            )
        arguments = kind.make(pipe, wanted)
    elif kind is not None and kind.make is _editor:
        arguments = kind.make(pipe, wanted)
    elif wanted.video is not None or wanted.depth is not None:
        raise ArgumentError(
            "video and depth must be None without structure, for which alone they are read: Gen1(structure=3)"
        )
    if wanted.content:
        arguments |= _content(kind, wanted.content)
    return arguments


# -- what each kind is called with


def _editor(pipe: VideoPipeline, wanted: Wanted) -> dict[str, Any]:
    """`StructureContentPipeline`, which estimates depth and takes detail out of it itself."""
    if wanted.video is None and wanted.depth is None:
        raise ArgumentError(f"video or depth must be given for {_name(pipe)}, got neither")
    arguments: dict[str, Any] = {} if wanted.structure is None else {"structure": wanted.structure}
    if wanted.video is not None:
        arguments["video"] = clip_frames(wanted.video)
    if wanted.depth is not None:
        arguments["depth"] = _given_depth(wanted, arguments.get("video"))
    elif wanted.depth_model is not None:
        arguments["depth"] = _estimated(pipe, wanted, arguments["video"])
    sizes = {"height": wanted.height, "width": wanted.width}
    return arguments | {name: size for name, size in sizes.items() if size is not None}


def _control(pipe: VideoPipeline, wanted: Wanted) -> dict[str, Any]:
    """A ControlNet sees every frame."""
    _, pictures, size = _structure(pipe, wanted, pipe.vae_scale_factor)
    _check_frames(pipe, len(pictures))
    return {"conditioning_frames": pictures, "num_frames": len(pictures), **size}


def _control_beside_video(pipe: VideoPipeline, wanted: Wanted) -> dict[str, Any]:
    """A ControlNet beside the clip itself, which is noised in part."""
    if wanted.video is None:
        raise ArgumentError(f"video must be given for {_name(pipe)}, which starts from it")
    frames, pictures, size = _structure(pipe, wanted, pipe.vae_scale_factor)
    _check_frames(pipe, len(pictures))
    assert frames is not None  # of the video
    return {"video": to_pil(frames), "conditioning_frames": pictures, **size}


def _sparse(pipe: VideoPipeline, wanted: Wanted) -> dict[str, Any]:
    """SparseCtrl sees the frames that are told."""
    _, pictures, size = _structure(pipe, wanted, pipe.vae_scale_factor)
    count = len(pictures)
    _check_frames(pipe, count)
    indices = list(range(count)) if wanted.frame_indices is None else list(wanted.frame_indices)
    if not indices or any(not is_whole(index, 0) or index >= count for index in indices):
        raise ArgumentError(f"frame_indices must be numbers of frames from 0 to {count - 1}, got {indices}")
    if len(set(indices)) < len(indices):
        raise ArgumentError(f"frame_indices must name every frame once, got {indices}")
    return {
        "conditioning_frames": [pictures[index] for index in indices],
        "controlnet_frame_indices": indices,
        "num_frames": count,
        **size,
    }


def _vace(pipe: VideoPipeline, wanted: Wanted) -> dict[str, Any]:
    """Wan-VACE takes depth as its `video`; where it has no mask, all of the clip is made anew."""
    denoiser: Any = denoisers_of(pipe)[0]
    patch = denoiser.config.patch_size
    _, pictures, size = _structure(pipe, wanted, pipe.vae_scale_factor_spatial * patch[1])
    count, group = len(pictures), pipe.vae_scale_factor_temporal
    if count % group != 1 % group:
        fewer = (count - 1) // group * group + 1
        raise ArgumentError(
            f"video must have {group} n + 1 frames for {_name(pipe)}, got {count}: cut it to {fewer}, or go on to "
            f"{fewer + group}"
        )
    return {"video": pictures, "num_frames": count, **size}


@dataclass(frozen=True)
class _Kind:
    """A pipeline that can take structure.

    Attributes:
        make: makes its arguments.
        structure: the argument that carries the structure.
        content: the argument for content; `None` for an IP-Adapter's.
    """

    make: Callable[[Any, Wanted], dict[str, Any]]
    structure: str
    content: str | None = None


#: By the name of the class, which is found without loading it; those that derive from another come first.
_KINDS = {
    "StructureContentPipeline": _Kind(_editor, "structure", "image"),
    "AnimateDiffControlNetPipeline": _Kind(_control, "conditioning_frames"),
    "AnimateDiffVideoToVideoControlNetPipeline": _Kind(_control_beside_video, "conditioning_frames"),
    "AnimateDiffSparseControlNetPipeline": _Kind(_sparse, "conditioning_frames"),
    "WanVACEPipeline": _Kind(_vace, "video", "reference_images"),
}


def _kind(pipe: VideoPipeline) -> _Kind | None:
    names = (base.__name__ for base in type(pipe).__mro__)
    return next((_KINDS[name] for name in names if name in _KINDS), None)


def _name(pipe: VideoPipeline) -> str:
    return type(pipe).__name__


def _content(kind: _Kind | None, content: Sequence[Any]) -> dict[str, Any]:
    pictures = list(content)
    if kind is None or kind.content is None:
        return {"ip_adapter_image": [pictures]}  # those of the one adapter
    if kind.content == "reference_images":
        return {"reference_images": pictures}
    if len(pictures) > 1:
        raise ArgumentError(f"content must be one image for StructureContentPipeline, got {len(pictures)}")
    return {"image": pictures[0]}


def _adapters(pipe: VideoPipeline) -> int:
    """How many IP-Adapters the denoiser has."""
    projection = getattr(next(iter(denoisers_of(pipe))), "encoder_hid_proj", None)
    return len(getattr(projection, "image_projection_layers", None) or ())


# -- depth


def _structure(
    pipe: VideoPipeline, wanted: Wanted, multiple: int
) -> tuple[torch.Tensor | None, list[Any], dict[str, int]]:
    """The frames, the pictures of their structure, and the size of both, which the pipeline is asked for, too."""
    frames = None if wanted.video is None else clip_frames(wanted.video)
    depth = _given_depth(wanted, frames)
    source = frames if depth is None else depth
    if source is None:
        raise ArgumentError(f"video or depth must be given for {_name(pipe)}, got neither")
    high, wide = source.shape[-2:]
    size = _size(wanted.height, wanted.width, (high, wide), multiple)
    if frames is not None:
        frames = cropped(frames, size)
    if depth is not None:
        depth = cropped(depth[:, None], size)[:, 0]
    else:
        assert frames is not None  # else there were no source
        depth = _estimated(pipe, wanted, frames)
    seen = structure_maps(depth[None], wanted.structure or 0)[0]
    return frames, grey_pictures(seen), dict(zip(("height", "width"), size, strict=True))


def _given_depth(wanted: Wanted, frames: torch.Tensor | None) -> torch.Tensor | None:
    """Depth `[F, H, W]` that is given, of the size of the frames where there are any."""
    if wanted.depth is None:
        return None
    if wanted.depth_model is not None:
        raise ArgumentError("depth and depth_model must not be given both")
    depth = depth_maps(wanted.depth)
    if frames is None:
        return depth
    if len(depth) != len(frames):
        raise ArgumentError(f"depth must have the {len(frames)} frames of video, got {len(depth)}")
    (high, wide), (rows, columns) = frames.shape[-2:], depth.shape[-2:]
    if abs(wide * rows - high * columns) > max(wide, high, rows, columns):
        raise ArgumentError(f"depth must have the aspect ratio of video, {high} x {wide}, got {rows} x {columns}")
    return cropped(depth[:, None], (high, wide))[:, 0]


def _estimated(pipe: VideoPipeline, wanted: Wanted, frames: torch.Tensor) -> torch.Tensor:
    """Depth `[F, H, W]` by the model that is named."""
    if wanted.depth_model is None:
        raise ArgumentError(
            f"depth or depth_model must be given for {_name(pipe)}, which cannot estimate depth itself: a depth model "
            "of transformers, or the folder or name of one, such as 'Intel/dpt-large'"
        )
    device = getattr(pipe, "_execution_device", None)
    model, processor = load_depth_model(wanted.depth_model, device)
    return estimate_depth(model, frames, processor, distance=wanted.distance)


def _size(height: int | None, width: int | None, source: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The size of the clip to be made:
    as asked for, or else that of the clip given, in multiples the pipeline takes.
    """
    for name, asked in (("height", height), ("width", width)):
        if asked is not None and (not is_whole(asked, 1) or asked % multiple):
            raise ArgumentError(f"{name} must be a multiple of {multiple}, got {asked!r}")
    high, wide = source
    if height is None and width is None:
        height, width = high // multiple * multiple, wide // multiple * multiple
    elif height is None and width is not None:
        height = round(width * high / wide / multiple) * multiple
    elif width is None and height is not None:
        width = round(height * wide / high / multiple) * multiple
    if not height or not width:
        raise ArgumentError(
            f"video must be at least {multiple} x {multiple} pixels for this pipeline, got {high} x {wide}"
        )
    return height, width


def _check_frames(pipe: VideoPipeline, count: int) -> None:
    longest = getattr(pipe.unet.config, "motion_max_seq_length", None)
    if longest and count > longest and not getattr(pipe, "free_noise_enabled", False):
        raise ArgumentError(
            f"video must have at most {longest} frames for the motion modules of this {_name(pipe)}, got {count} "
            "(pipe.enable_free_noise() lifts this)"
        )
