"""Guidance methods by name, as the command line spells them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cvg_kernels.capture.tokens import Word
from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.vico import Vico

METHODS = {"none": None, "vico": Vico}


def method_named(name: str, words: Sequence[Word] | None = None) -> Any:
    """Makes a method with its default settings; `None` for `"none"`.

    Args:
        name: of `METHODS`.
        words: what it looks at; `None` leaves the choice to the method.

    Raises:
        ArgumentError: for an unknown name; lists those there are.
    """
    if name not in METHODS:
        raise ArgumentError(f"guidance must be one of {', '.join(METHODS)}, got {name!r}")
    kind = METHODS[name]
    return None if kind is None else kind(words=words)
