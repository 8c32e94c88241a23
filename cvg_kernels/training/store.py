"""Features on disk, so that training does not run the generator again.

A folder holds `index.json` and shards `NNNNNN.safetensors`, numbered by their first clip. The index says how the
features were made: format, labels, timesteps, the selection (layers, heads, grid), the pipeline's fingerprint and the
recipe. A shard holds, for N examples of at most E entities,

    maps    float16 [N, T, E, M, F, h, w]   cross-attention of each entity at each step, layer and head; zeros past the last
    label   int8 [N, E]                     what is true of the entity; −1: no such entity, or not known
    asked   int8 [N, E]                     what the prompt said of it; −1: no such entity
    source  uint8 [N]                       0 inverted with the right prompt, 1 with a wrong one, 2 generated
    clip    int64 [N]                       number of the clip; both inversions of a clip share it
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError

FORMAT = 1
RIGHT_PROMPT, WRONG_PROMPT, GENERATED = range(3)


@dataclass
class Examples:
    """Features with their labels; fields as described above."""

    maps: torch.Tensor
    label: torch.Tensor
    asked: torch.Tensor
    source: torch.Tensor
    clip: torch.Tensor

    def __len__(self) -> int:
        return len(self.clip)

    def where(self, keep: torch.Tensor) -> Examples:
        """The examples that a mask or a list of numbers selects."""
        return Examples(*(getattr(self, field.name)[keep] for field in fields(self)))

    @classmethod
    def join(cls, parts: list[Examples]) -> Examples:
        """One after the other."""
        return cls(
            *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls))
        )


def settle(path: Path, settings: dict[str, Any]) -> None:
    """Writes how something is made, or checks that it was begun in the same way.

    Args:
        path: of a JSON file in the folder of what is made.
        settings: JSON.

    Raises:
        ArgumentError: if the file there says something else.
    """
    settings = json.loads(json.dumps(settings))
    if path.exists():
        there = json.loads(path.read_text())
        changed = [key for key in settings if there.get(key) != settings[key]]
        if changed:
            raise ArgumentError(
                f"{path.parent} was made with another {', '.join(changed)}: give another --output, or delete it"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(partial, path)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Writes the index of a folder of features, or checks the one there.

    Raises:
        ArgumentError: if the folder holds features made in another way.
    """
    settle(folder / "index.json", {"format": FORMAT} | index)


def shard(folder: Path, first: int) -> Path:
    """Where the shard that begins with clip `first` lies."""
    return folder / f"{first:06d}.safetensors"


def write_shard(path: Path, examples: Examples) -> None:
    """Writes a shard, all of it or nothing."""
    from safetensors.torch import save_file

    partial = path.with_suffix(f".{os.getpid()}")
    save_file(
        {field.name: getattr(examples, field.name).contiguous() for field in fields(examples)},
        partial,
    )
    os.replace(partial, path)


def load(folder: Path) -> tuple[dict[str, Any], Examples]:
    """Reads the index and all examples of a folder.

    Raises:
        ArgumentError: if there are none.
    """
    from safetensors.torch import load_file

    paths = sorted(folder.glob("*.safetensors"))
    if not paths or not (folder / "index.json").exists():
        raise ArgumentError(f"{folder} must hold features (index.json and shards), got none")
    index = json.loads((folder / "index.json").read_text())
    return index, Examples.join([Examples(**load_file(path)) for path in paths])
