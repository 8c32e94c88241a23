"""The denoisers that are known, and how each one is called.

Supporting another model is one entry in `MODELS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.signatures import named_arguments

Grid = tuple[int, int, int]  # frames, rows, columns

#: Arguments that all samples of a denoiser call share, whatever the length of their first dimension.
_SHARED = frozenset(
    (
        "image_rotary_emb",
        "attention_kwargs",
        "cross_attention_kwargs",
        "control_hidden_states_scale",
    )
)


@dataclass(frozen=True)
class Model:
    """What capture and guidance must know of a denoiser class.

    Attributes:
        latents: name of the forward argument that holds the latents.
        grid: (latents' shape `[B, C, F, H, W]`, tokens per sample, denoiser) → the grid of an attention layer.
        frames_in_batch: whether cross-attention sees one sample per frame (`[B·F, h·w, C]`), and temporal layers relate
            the frames; if not, self-attention or joint attention spans the video.
        batched_branches: whether pipelines stack [unconditional, conditional] into one call.
        text_per_frame: whether the caller repeats the text for every frame.
        text_projection: name of the module that the text passes before it reaches the layers.
        frame_positions: name of the buffer `[1, F, C]` that is added to the frames before the first temporal layer, in a
            model that has one in its forward (others have modules for it).
        frames_first: whether the latents are `[B, F, C, H, W]`, not `[B, C, F, H, W]`.
        joint: whether one attention relates text and video, in one sequence that the text begins.
        temporal_modules: the names of the modules through which alone its frames see each other, each of which adds to
            what it is given; `None` if there are no such modules.
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
    temporal_modules: re.Pattern[str] | None = None

    def per_sample(self, name: str) -> bool:
        """Whether an argument of the forward may hold one entry for every sample (or every frame of one)."""
        return name not in _SHARED

    def channels(self, denoiser: nn.Module) -> int:
        """How many of the channels that the denoiser is given are latents; conditions stand behind them."""
        config = unwrap(denoiser).config
        return min(config.in_channels, config.get("out_channels") or config.in_channels)

    def named(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the denoiser takes them, with their axes as `[B, C, F, H, W]`."""
        return latents.transpose(1, 2) if self.frames_first else latents

    def native(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[B, C, F, H, W]` with their axes as the denoiser takes them."""
        return latents.transpose(1, 2) if self.frames_first else latents


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


_WAN = Model("hidden_states", _patch_grid, frames_in_batch=False, batched_branches=False)

MODELS: dict[str, Model] = {
    "UNetMotionModel": Model(
        "sample",
        unet_grid,
        frames_in_batch=True,
        batched_branches=True,
        text_per_frame=True,
        temporal_modules=re.compile(r"motion_modules\.\d+$"),
    ),
    "UNet3DConditionModel": Model(
        "sample",
        unet_grid,
        frames_in_batch=True,
        batched_branches=True,
        temporal_modules=re.compile(r"(temp_convs|temp_attentions)\.\d+$|^transformer_in$"),
    ),
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "LatteTransformer3DModel": Model(
        "hidden_states",
        _frame_patch_grid,
        frames_in_batch=True,
        batched_branches=True,
        text_projection="caption_projection",
        frame_positions="temp_pos_embed",
    ),
    "CogVideoXTransformer3DModel": Model(
        "hidden_states",
        _frame_patch_grid,
        frames_in_batch=False,
        batched_branches=True,
        frames_first=True,
        joint=True,
    ),
}


def unwrap(denoiser: nn.Module) -> nn.Module:
    """The network behind the wrappers of `torch.compile`, PEFT and data parallelism."""
    while True:
        if hasattr(denoiser, "_orig_mod"):
            denoiser = denoiser._orig_mod
        elif hasattr(denoiser, "get_base_model"):
            denoiser = denoiser.get_base_model()
        elif isinstance(getattr(denoiser, "module", None), nn.Module):
            denoiser = denoiser.module
        else:
            return denoiser


def model_of(denoiser: nn.Module) -> Model:
    """The table entry of a denoiser, by its class or the nearest class that it derives from.

    Raises:
        ArgumentError: for a class that is not in `MODELS`.
    """
    kind = type(unwrap(denoiser))
    for base in kind.__mro__:
        if base.__name__ in MODELS:
            return MODELS[base.__name__]
    raise ArgumentError(f"denoiser must be one of {', '.join(MODELS)}, got {kind.__name__}")


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


def arguments_of(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a denoiser call by name."""
    kind = type(unwrap(denoiser))
    return named_arguments(kind, "forward", model_of(denoiser).latents, args, kwargs)
