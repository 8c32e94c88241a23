"""Transformers whose video attends to the text in layers of their own, the whole video at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.models.grids import frame_patch_grid, patch_grid, token_grid
from cvg_kernels.pipeline.models.model import Arguments, Grid, Layers, Model

_TEXT, _VIDEO = Layers(r"blocks\.\d+\.attn2$", "cross"), Layers(r"blocks\.\d+\.attn1$", "self")


def _packed_sizes(arguments: Arguments) -> Grid:
    """Returns the grid of LTX's packed latents: told by name, or read from the coordinates of the tokens."""
    told = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    if None not in told:
        return told
    coordinates = arguments.get("video_coords")
    if coordinates is None:
        raise ArgumentError(
            "the denoiser must be told the size of packed latents: num_frames, height and width, or video_coords"
        )
    times, rows, columns = coordinates[0]
    rows, columns = rows.unique().numel(), columns.unique().numel()
    times = times[:: rows * columns]
    # Frames that are given for later stand first, each at a time after the beginning of the video.
    begin = int((times == times.min()).nonzero().max())
    return len(times) - begin, rows, columns


_LTX = frozenset(("attention_kwargs", "rope_interpolation_scale"))

#: LTX: latents packed into tokens.
LTX = Model(token_grid, (_TEXT, _VIDEO), axes="BNC", sizes=_packed_sizes, masks_alike=True, shared=_LTX)


def _ltx2_disturbed(arguments: Arguments) -> bool:
    """Returns whether LTX 2 is called without the attention of some blocks, or with video and audio apart."""
    names = ("spatio_temporal_guidance_blocks", "isolate_modalities")
    return any(arguments.get(name) for name in names)


#: LTX 2: beside it audio, whose layers take no part.
LTX2 = Model(
    token_grid,
    (_TEXT, _VIDEO),
    axes="BNC",
    sizes=_packed_sizes,
    condition_behind=True,
    masks_alike=True,
    shared=_LTX,
    disturbed=_ltx2_disturbed,
)

#: Allegro: its text has an axis more.
ALLEGRO = Model(frame_patch_grid, (_TEXT, _VIDEO), masks_alike=True)


def _condition_mask(arguments: Arguments, config: Any) -> torch.Tensor | None:
    """Returns where Cosmos is given frames."""
    return arguments.get("condition_mask")


def _cosmos2_scale(arguments: Arguments, sigma: float) -> float:
    """Returns c = 1 / (1 + σ) for Cosmos 2, which tells the denoiser a time of every frame, and frames per second."""
    of_frames = arguments["timestep"].ndim == 5 and arguments.get("fps") is not None
    return 1 / (1 + sigma) if of_frames else 1.0


#: Cosmos 1, 2 and 2.5.
COSMOS = Model(
    patch_grid,
    (_TEXT, _VIDEO),
    batched_branches=False,
    given=_condition_mask,
    scaled_by=_cosmos2_scale,
    shared=frozenset(("padding_mask",)),
)

#: Sana: its self-attention is linear.
SANA_VIDEO = Model(patch_grid, (_TEXT,), masks_alike=True)


def _kandinsky_tiles(arguments: Arguments) -> int:
    """Returns the side of the tiles of Kandinsky's sparse self-attention, which orders the tokens by them."""
    sparse = arguments.get("sparse_params")
    return 8 if sparse is not None and sparse["to_fractal"] else 1


def _kandinsky_given(arguments: Arguments, config: Any) -> torch.Tensor | None:
    """Returns where Kandinsky is given frames: its last channel, if it has those of a condition."""
    if not config.get("visual_cond"):
        return None
    return arguments["hidden_states"][..., -1:].movedim(-1, 1)


def _sparse_self_attention(denoiser: nn.Module, name: str) -> bool:
    """Whether a layer attends by blocks, with flex attention."""
    return name.endswith("self_attention") and denoiser.config.get("attention_type") == "nabla"


#: Kandinsky 5: channels last; the blocks of the text take no part.
KANDINSKY5 = Model(
    patch_grid,
    (
        Layers(r"visual_transformer_blocks\.\d+\.cross_attention$", "cross"),
        Layers(r"visual_transformer_blocks\.\d+\.self_attention$", "self"),
    ),
    axes="BFHWC",
    tiles=_kandinsky_tiles,
    channels_of=("in_visual_dim", "out_visual_dim"),
    given=_kandinsky_given,
    leaves_out=_sparse_self_attention,
    batched_branches=False,
)
