"""The world of moving shapes: an honest testbed that ships. Its parts are loaded when they are used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOMES = {
    "Scene": "world",
    "Seen": "oracle",
    "Thing": "world",
    "Verdict": "oracle",
    "caption": "world",
    "evaluate": "evaluation",
    "judge": "oracle",
    "load_editor": "editor",
    "load_pipeline": "pipeline",
    "look": "oracle",
    "parse_caption": "world",
    "random_scene": "world",
    "render": "world",
    "sample": "pipeline",
}

__all__ = [
    "Scene",
    "Seen",
    "Thing",
    "Verdict",
    "caption",
    "evaluate",
    "judge",
    "load_editor",
    "load_pipeline",
    "look",
    "parse_caption",
    "random_scene",
    "render",
    "sample",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


if TYPE_CHECKING:
    from cvg_kernels.shapes.editor import load_editor
    from cvg_kernels.shapes.evaluation import evaluate
    from cvg_kernels.shapes.oracle import Seen, Verdict, judge, look
    from cvg_kernels.shapes.pipeline import load_pipeline, sample
    from cvg_kernels.shapes.world import Scene, Thing, caption, parse_caption, random_scene, render
