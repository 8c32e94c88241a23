"""The file of settings of a classifier, checked: it may have come from anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cvg_kernels.errors import ArgumentError, is_whole
from cvg_kernels.reading import read_object

#: Above what any classifier has: a file that asks for more would only fill the memory, or never end.
_MOST = 65536
_MOST_DEPTH = 256


def read_settings(path: Path, form: int) -> dict[str, Any]:
    """Reads the settings of a classifier.

    Args:
        path: path of the file.
        form: number of the format.

    Raises:
        ArgumentError: if they are not those of a classifier; says what of them is not.
    """
    found = read_object(path)
    if found.get("format") != form:
        raise ArgumentError(f"classifier must be of format {form}, got {found.get('format')!r:.80} in {path.parent}")
    for name, (good, what) in _FIELDS.items():
        if not good(found.get(name)):
            raise ArgumentError(f"{path} must have {name}: {what}; got {found.get(name)!r:.80}")
    if len(found["heads"]) != len(found["layers"]):
        raise ArgumentError(
            f"{path} must have a number of heads for each of {len(found['layers'])} layers, got {len(found['heads'])}"
        )
    return found


def _some(good: Callable[[Any], bool], least: int = 1) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and least <= len(value) <= _MOST and all(map(good, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < 1000


def _is_size(value: Any) -> bool:
    return is_whole(value, 1) and value <= _MOST


def _are_heads(value: Any) -> bool:
    return _some(_is_size)(value) and sum(value) <= _MOST


def _is_grid(value: Any) -> bool:
    return _some(_is_size, 3)(value) and len(value) == 3 and math.prod(value) <= 2**26


def _is_model(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("class"))
        and isinstance(value.get("norms"), dict)
        and all(_some(_is_number, 2)(one) and len(one) == 2 for one in value["norms"].values())
    )


def _is_aggregator(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) <= {"channels", "width", "depth", "heads"}
        and all(map(_is_size, value.values()))
        and value.get("depth", 1) <= _MOST_DEPTH
        and value.get("width", 64) % value.get("heads", 4) == 0
    )


def _is_backbone(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_text(value.get("kind")):
        return False
    kinds = {"width": _is_size, "dropout": _is_share, "template": _is_template, "scale": _is_number}
    return all(name == "kind" or (name in kinds and kinds[name](one)) for name, one in value.items())


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_template(value: Any) -> bool:
    """A sentence with one place for a label: `str.format` could look into objects, and make any length."""
    return _is_text(value) and value.count("{}") == 1 and not set("{}") & set(value.replace("{}", ""))


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "labels": (_some(_is_text, 2), "at least two words"),
    "layers": (_some(_is_text), "names"),
    "heads": (_are_heads, "numbers from 1"),
    "grid": (_is_grid, "frames, rows and columns"),
    "timesteps": (_some(_is_number), "finite numbers"),
    "model": (_is_model, "the class of a denoiser and the norms of its layers, two each"),
    "aggregator": (
        _is_aggregator,
        "channels, width, depth and heads, whole numbers, the width a multiple of the heads",
    ),
    "backbone": (_is_backbone, "a kind and its options"),
    "training": (lambda value: isinstance(value, dict), "the figures of the training"),
}
