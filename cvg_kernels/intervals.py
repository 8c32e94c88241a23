"""Rates, means and paired differences with their 95 % intervals, as the reports write them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: The 97.5 % quantile of the normal distribution.
Z95 = 1.959964


def wilson(successes: int, count: int) -> list[float]:
    """The 95 % Wilson score interval of a rate."""
    if count == 0:
        return [0.0, 1.0]
    z, rate = Z95, successes / count
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def rate(values: Sequence[bool]) -> dict[str, Any]:
    """A rate with its interval and the number it stands on."""
    hits = sum(values)
    return {"rate": hits / max(len(values), 1), "ci95": wilson(hits, len(values)), "n": len(values)}


def mean(values: Sequence[float | None]) -> dict[str, Any]:
    """A mean with its 95 % normal interval and the number it stands on.

    Entries of `None` are left out; with fewer than two others the mean and the interval are `None`.
    """
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return {"mean": None, "ci95": None, "n": len(known)}
    middle = float(np.mean(known))
    half = Z95 * float(np.std(known, ddof=1)) / math.sqrt(len(known))
    return {"mean": middle, "ci95": [middle - half, middle + half], "n": len(known)}


def paired_difference(one: Sequence[float | None], other: Sequence[float | None]) -> dict[str, Any]:
    """Other − one over the same prompts and seeds, with the 95 % normal interval of paired differences.

    Pairs with a `None` are left out; with fewer than two others the difference and the interval are `None`.
    """
    found = mean(
        [
            None if before is None or after is None else float(after) - float(before)
            for before, after in zip(one, other, strict=True)
        ]
    )
    return {"difference": found["mean"], "ci95": found["ci95"]}


def paired_differences(
    one: Mapping[str, Sequence[float | None]], other: Mapping[str, Sequence[float | None]]
) -> dict[str, Any]:
    """`paired_difference` of every kind of score."""
    return {kind: paired_difference(one[kind], values) for kind, values in other.items()}
