"""Editing of clips: structure, content, and the pipeline that joins them. Its parts are loaded when they are used."""

from __future__ import annotations

import importlib

_HOMES = {
    "StructureContentOutput": "pipeline",
    "StructureContentPipeline": "pipeline",
    "embed_images": "content",
    "embed_texts": "content",
    "estimate_depth": "depth",
    "predict_image_embedding": "content",
    "structure_maps": "structure",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
