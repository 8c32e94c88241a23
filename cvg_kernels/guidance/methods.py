"""Guidance methods by name, as the command line spells them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cvg_kernels.capture.tokens import Word
from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.cvg import CVG
from cvg_kernels.guidance.together import Together
from cvg_kernels.guidance.vico import Vico

#: Name → what makes the method with its default settings, given the words it shall look at.
METHODS: dict[str, Callable[[Sequence[Word] | None], Any]] = {
    "none": lambda words: None,
    "vico": lambda words: Vico(words=words),
    "cvg": lambda words: CVG(),  # it finds its entities in the prompt
    "cvg+vico": lambda words: Together((CVG(), Vico(words=words))),
}


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
    return METHODS[name](words)
