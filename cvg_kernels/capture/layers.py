"""Which attention is which: the layers of a denoiser, their kinds, and how a model lays out its tokens.

Supporting another model is one entry in `MODELS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError

Kind = Literal["cross", "self", "temporal"]
Grid = tuple[int, int, int]  # frames, rows, columns


@dataclass(frozen=True)
class Layer:
    """One attention layer of a denoiser."""

    name: str  #: dotted path of the module
    module: nn.Module
    kind: Kind  #: joint attention of text and video is cross: there the words are looked at


@dataclass(frozen=True)
class Model:
    """What capture and guidance must know of a denoiser class.

    Attributes:
        latents: name of the forward argument that holds the latents; it comes first.
        grid: (latents' shape `[B, C, F, H, W]`, tokens per sample, denoiser) → the layer's grid.
        frames_in_batch: whether cross-attention sees one sample per frame (`[B·F, h·w, C]`), and temporal layers relate
            the frames; if not, self-attention or joint attention spans the video.
        batched_branches: whether the pipeline stacks [unconditional, conditional] into one call.
        text_per_frame: whether the caller repeats the text for every frame.
        text_projection: name of the module that the text passes before it reaches the layers.
        frame_positions: name of the buffer `[1, F, C]` that is added to the frames before the first temporal layer, in a
            model that has one in its forward (others have modules for it).
        frames_first: whether the latents are `[B, F, C, H, W]`, not `[B, C, F, H, W]`.
        joint: whether one attention relates text and video, in one sequence that the text begins.
    """

    latents: str
    grid: Callable[[tuple[int, ...], int, Any], Grid]
    frames_in_batch: bool
    batched_branches: bool
    text_per_frame: bool = False
    text_projection: str | None = None
    frame_positions: str | None = None
    frames_first: bool = False
    joint: bool = False

    def latents_of(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The latents that a denoiser is called with, as `[B, C, F, H, W]`."""
        given = kwargs[self.latents] if self.latents in kwargs else args[0]
        return given.transpose(1, 2) if self.frames_first else given


def unet_grid(latents: tuple[int, ...], tokens: int, denoiser: Any) -> Grid:
    """A UNet halves rows and columns, rounding up, until they hold as many tokens as the layer has."""
    frames, rows, columns = latents[2:]
    while rows * columns > tokens:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != tokens:
        raise ArgumentError(f"a layer of {tokens} tokens fits no level of latents {tuple(latents)}")
    return frames, rows, columns


def _patch_grid(latents: tuple[int, ...], tokens: int, denoiser: Any) -> Grid:
    """A video transformer cuts the latents into patches once."""
    frames, rows, columns = (
        size // patch for size, patch in zip(latents[2:], denoiser.config.patch_size, strict=True)
    )
    return frames, rows, columns


def _frame_patch_grid(latents: tuple[int, ...], tokens: int, denoiser: Any) -> Grid:
    """A transformer on images cuts each frame into patches; that of CogVideoX 1.5 takes two frames together."""
    frames, rows, columns = latents[2:]
    patch, together = denoiser.config.patch_size, denoiser.config.get("patch_size_t") or 1
    return frames // together, rows // patch, columns // patch


MODELS: dict[str, Model] = {
    "UNetMotionModel": Model("sample", unet_grid, True, True, text_per_frame=True),
    "UNet3DConditionModel": Model("sample", unet_grid, True, True),
    "WanTransformer3DModel": Model("hidden_states", _patch_grid, False, False),
    "LatteTransformer3DModel": Model(
        "hidden_states",
        _frame_patch_grid,
        True,
        True,
        text_projection="caption_projection",
        frame_positions="temp_pos_embed",
    ),
    "CogVideoXTransformer3DModel": Model(
        "hidden_states", _frame_patch_grid, False, True, frames_first=True, joint=True
    ),
}

_TEMPORAL = re.compile(r"motion_modules|temp_attentions|transformer_in|temporal_transformer_blocks")
#: Where a cross-attention layer stands → the names of the temporal layers behind it.
_BEHIND = (
    (re.compile(r"(.*\.)attentions\.(\d+)\."), r"{}(motion_modules|temp_attentions)\.{}\."),
    (re.compile(r"()transformer_blocks\.(\d+)\."), r"{}temporal_transformer_blocks\.{}\."),
)


def unwrap(denoiser: nn.Module) -> nn.Module:
    """The module behind `torch.compile`."""
    return getattr(denoiser, "_orig_mod", denoiser)


def model_of(denoiser: nn.Module) -> Model:
    """The table entry of a denoiser.

    Raises:
        ArgumentError: for a class that is not in `MODELS`.
    """
    name = type(unwrap(denoiser)).__name__
    if name not in MODELS:
        raise ArgumentError(f"denoiser must be one of {', '.join(MODELS)}, got {name}")
    return MODELS[name]


def denoisers_of(pipe: Any) -> list[nn.Module]:
    """The denoisers of a pipeline (Wan 2.2 has two), or the denoiser itself if given one."""
    if isinstance(pipe, nn.Module):
        return [pipe]
    found = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    found = [denoiser for denoiser in found if denoiser is not None]
    if not found:
        raise ArgumentError(
            f"pipe must have a unet or a transformer, got {type(pipe).__name__} without either"
        )
    return found


def attention_layers(denoiser: nn.Module) -> list[Layer]:
    """All attention layers of a denoiser, classified."""
    denoiser = unwrap(denoiser)
    model = MODELS.get(type(denoiser).__name__)
    joint = model is not None and model.joint
    return [
        Layer(name, module, "cross" if joint else _kind(name, module))
        for name, module in denoiser.named_modules()
        if hasattr(module, "set_processor") and hasattr(module, "processor")
    ]


def _kind(name: str, module: nn.Module) -> Kind:
    if _TEMPORAL.search(name):
        return "temporal"
    return "cross" if getattr(module, "is_cross_attention", False) else "self"


def frame_layers(denoiser: nn.Module) -> list[Layer]:
    """The layers in which frames attend to each other: the temporal ones, or those whose attention spans the video."""
    model = model_of(denoiser)
    kind = "temporal" if model.frames_in_batch else "cross" if model.joint else "self"
    return [layer for layer in attention_layers(denoiser) if layer.kind == kind]


def temporal_partners(layers: list[Layer], cross: Layer) -> list[Layer]:
    """The temporal layers that follow a cross-attention layer in its block, in the order in which they run."""
    partners = []
    for pattern, names in _BEHIND:
        if place := pattern.match(cross.name):
            behind = re.compile(names.format(*map(re.escape, place.groups())))
            partners += [one for one in layers if one.kind == "temporal" and behind.match(one.name)]
    return sorted(partners, key=lambda layer: layer.name)


def spatial_partner(layers: list[Layer], cross: Layer) -> Layer | None:
    """The attention among the positions of a frame that stands in the same transformer block as a cross-attention layer."""
    name = re.sub(r"attn2$", "attn1", cross.name)
    return next((layer for layer in layers if layer.kind == "self" and layer.name == name), None)
