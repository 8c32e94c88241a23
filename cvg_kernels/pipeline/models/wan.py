"""Wan and what is built on its transformer: cross-attention over the whole video."""

from __future__ import annotations

from dataclasses import replace

from cvg_kernels.pipeline.models.grids import patch_grid
from cvg_kernels.pipeline.models.model import Arguments, Layers, Model

#: A call for each branch of guidance. A layer of an image-to-video model attends to the tokens of an image first, by a
#: call of its own; the attention to a face (Animate) takes no part.
WAN = Model(
    patch_grid,
    (Layers(r"blocks\.\d+\.attn2$", "cross"), Layers(r"blocks\.\d+\.attn1$", "self")),
    batched_branches=False,
    image_call_first=True,
    shared=frozenset(("attention_kwargs", "control_hidden_states_scale")),
)

#: Both branches in a call, frames before channels.
ANYFLOW = replace(
    WAN,
    axes="BFCHW",
    batched_branches=True,
    image_call_first=False,
    shared=frozenset(("attention_kwargs", "kv_cache", "kv_cache_flag", "chunk_partition")),
)


def _fills_cache(arguments: Arguments) -> bool:
    """Whether a finished chunk is put into the cache of keys and values."""
    return bool((arguments.get("kv_cache_flag") or {}).get("is_cache_step"))


#: The video chunk by chunk, each attending to those before it by a cache and flex attention.
ANYFLOW_FAR = replace(ANYFLOW, layers=ANYFLOW.layers[:1], prepares=_fills_cache, whole="kv_cache")
