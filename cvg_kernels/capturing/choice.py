"""Which layers and steps a capture records."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from cvg_kernels.errors import ArgumentError, is_whole


def chosen_layers(layers: Any) -> Callable[[str], bool]:
    """Returns which layers are wanted, by name.

    Args:
        layers: a regular expression, a list of names, a function of the name, or `None` for all.

    Raises:
        ArgumentError: for anything else.
    """
    if layers is None:
        return lambda name: True
    if isinstance(layers, str):
        try:
            return lambda name, pattern=re.compile(layers): pattern.search(name) is not None
        except re.error as error:
            raise ArgumentError(f"layers must be a regular expression, got {layers!r}: {error}") from None
    if callable(layers):
        return lambda name: bool(layers(name))
    if isinstance(layers, (list, tuple, set, frozenset)) and all(isinstance(n, str) for n in layers):
        return frozenset(layers).__contains__
    raise ArgumentError(
        f"layers must be a regular expression, a list of names, a function of the name or None, got {layers!r}"
    )


def chosen_steps(steps: Any) -> frozenset[int] | range | None:
    """Returns which steps are wanted, `None` for all.

    Args:
        steps: a number, several, a range, or `None`.

    Raises:
        ArgumentError: for anything else.
    """
    if steps is None:
        return None
    if isinstance(steps, range) and steps and min(steps[0], steps[-1]) >= 0:
        return steps  # however long
    if is_whole(steps):
        steps = (steps,)
    try:
        chosen = frozenset(steps)
    except TypeError:
        raise ArgumentError(f"steps must be numbers of steps, 0 first, or None, got {steps!r}") from None
    if not chosen or not all(is_whole(step, 0) for step in chosen):
        raise ArgumentError(f"steps must be numbers of steps, 0 first, or None, got {sorted(map(str, chosen))}")
    return chosen
