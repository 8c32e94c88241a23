"""The exceptions of the package. The command line prints them as one line and exits with 2."""

from __future__ import annotations

import math
from collections.abc import Iterable


class CvgError(Exception):
    """An error that the caller can fix; the message says how."""


class ArgumentError(CvgError, ValueError):
    """An argument does not fit: names it, what was given and what is accepted."""


class BackendUnavailableError(CvgError, RuntimeError):
    """A backend that was asked for by name cannot run here: says why and how to get it."""


def check_flag(name: str, value: object) -> None:
    """Checks that a setting is `True` or `False`, and no word that only means one of them.

    Args:
        name: name of the setting, for the message.
        value: that was given.

    Raises:
        ArgumentError: if it is not.
    """
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False, got {value!r}")


def is_whole(value: object, least: float = -math.inf) -> bool:
    """Says whether a value is a whole number, which `True` is not.

    Args:
        value: any.
        least: the least that counts.
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def nearest(given: object, accepted: Iterable[object]) -> str:
    """Suggests, for the end of a message, the accepted name that looks most like the one that was given.

    Args:
        given: what is not accepted; nothing is suggested if it is no name.
        accepted: what is; values other than names are passed over.

    Returns:
        `"; did you mean 'vico'?"`, or nothing if none looks like it.
    """
    from difflib import get_close_matches

    names = {name.lower(): name for name in accepted if isinstance(name, str)}
    found = get_close_matches(given.lower(), names, n=1) if isinstance(given, str) else []
    return f"; did you mean {names[found[0]]!r}?" if found else ""


class GuidanceWarning(UserWarning):
    """Something was attached to a pipeline and did less than it seems: says what."""
