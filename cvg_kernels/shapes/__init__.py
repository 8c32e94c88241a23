"""The world of moving shapes: an honest testbed that ships. Its parts are loaded when they are used."""

from __future__ import annotations

import importlib

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

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
