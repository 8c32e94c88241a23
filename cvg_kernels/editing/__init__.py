"""Editing of clips: structure, content, and the pipeline that joins them. Its parts are loaded when they are used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOMES = {
    "StructureContentOutput": "pipeline",
    "StructureContentPipeline": "pipeline",
    "embed_images": "content",
    "embed_texts": "content",
    "estimate_depth": "depth",
    "predict_image_embedding": "content",
    "structure_maps": "structure",
}

__all__ = [
    "StructureContentOutput",
    "StructureContentPipeline",
    "embed_images",
    "embed_texts",
    "estimate_depth",
    "predict_image_embedding",
    "structure_maps",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


if TYPE_CHECKING:
    from cvg_kernels.editing.content import embed_images, embed_texts, predict_image_embedding
    from cvg_kernels.editing.depth import estimate_depth
    from cvg_kernels.editing.pipeline import StructureContentOutput, StructureContentPipeline
    from cvg_kernels.editing.structure import structure_maps
