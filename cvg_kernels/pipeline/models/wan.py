"""Wan and what is built on its transformer: cross-attention over the whole video, a call for each branch of guidance."""

from __future__ import annotations

from cvg_kernels.pipeline.models.grids import patch_grid
from cvg_kernels.pipeline.models.model import Layers, Model

#: A layer of an image-to-video model attends to the tokens of an image first, by a call of its own.
WAN = Model(
    patch_grid,
    (Layers(r"blocks\.\d+\.attn2$", "cross"), Layers(r"blocks\.\d+\.attn1$", "self")),
    batched_branches=False,
    image_call_first=True,
    shared=frozenset(("attention_kwargs", "control_hidden_states_scale")),
)
