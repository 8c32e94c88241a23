"""Transformers in which one attention relates text and video, in one sequence."""

from __future__ import annotations

from cvg_kernels.pipeline.models.grids import frame_patch_grid
from cvg_kernels.pipeline.models.model import Layers, Model

#: CogVideoX: text first, its padding attended to.
COGVIDEOX = Model(
    frame_patch_grid,
    (Layers(r"transformer_blocks\.\d+\.attn1$", "cross", "first"),),
    axes="BFCHW",
)
