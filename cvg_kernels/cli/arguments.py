"""Types of command-line arguments whose errors say what is accepted."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def path(text: str) -> Path:
    """Reads the name of a file or a folder.

    Raises:
        argparse.ArgumentTypeError: for an empty one, which would be the folder one is in.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be a file or a folder, got {text!r}")
    return Path(text)


def whole(low: int, high: int) -> Callable[[str], int]:
    """Makes a reader of whole numbers in a range.

    Args:
        low: the least that is accepted.
        high: the most.
    """

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return number

    return read
