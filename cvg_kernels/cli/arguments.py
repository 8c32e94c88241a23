"""Types of command-line arguments whose errors say what is accepted."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


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


def add_settings(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any], settings: Iterable[tuple[str, type, str]]
) -> None:
    """Adds an option for each plain setting of a job, its dtype and its device.

    Args:
        parser: of the command that does the job.
        defaults: name → default.
        settings: names, types and meanings of the others.
    """
    settings = (
        *settings,
        ("dtype", str, "float32, bfloat16 or float16"),
        ("device", str, "cpu or cuda, or one GPU of several: cuda:1"),
    )
    for name, kind, meaning in settings:
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=defaults[name], help=meaning)


def settings_of(options: argparse.Namespace, job: type) -> dict[str, Any]:
    """Those of the options that a job has, its words as a list.

    Args:
        options: of the command.
        job: a dataclass.
    """
    found = {name: value for name, value in vars(options).items() if name in job.__annotations__}
    return found | {"words": [word.strip() for word in options.words.split(",")] if options.words else []}


def add_recipe(parser: argparse.ArgumentParser, recipe: Mapping[str, Any]) -> None:
    """Adds an option for each number of a training recipe.

    Args:
        parser: of the command that trains.
        recipe: name → default.
    """
    meanings = {
        "clips": "clips to train on",
        "edit_clips": "clips to train the editor on",
        "pictures": "pictures to train on, in a cycle",
        "image_cycles": "cycles of the learning rate on pictures, each with pictures of its own",
        "comparison_steps": "steps of denoisers trained otherwise, for `shapes edits`; 0 trains none",
        "seed": "seed of everything that is drawn",
    }
    for name, value in recipe.items():
        stage = name.removesuffix("_steps").replace("_", " ")
        meaning = meanings.get(name, f"training steps of the stage {stage!r}")
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=meaning)
