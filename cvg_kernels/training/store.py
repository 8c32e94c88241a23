"""Features on disk, so that training does not run the generator again.

A folder holds `index.json` and shards `NNNNNN.safetensors`, numbered by their first clip. The index says how the
features were made: format, labels, timesteps, the selection (layers, heads, grid), the pipeline's fingerprint and the
recipe. A shard holds, for N examples of at most E entities,

    maps    float16 [N, T, E, M, F, h, w]   attention to each entity at each step, layer and head; zeros past the last
    label   int8 [N, E]                     what is true of the entity; −1: no such entity, or not known
    asked   int8 [N, E]                     what the prompt said of it; −1: no such entity
    source  uint8 [N]                       0 inverted with the right prompt, 1 with a wrong one, 2 generated
    clip    int64 [N]                       number of the clip; both inversions of a clip share it
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError, is_whole
from cvg_kernels.reading import read_object, read_tensors, tensor_headers
from cvg_kernels.writing import write_json, write_tensors

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
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def write_or_check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes how something is made, or checks that it was begun in the same way.

    Args:
        path: path of a JSON file in the folder of what is made.
        settings: JSON.

    Raises:
        ArgumentError: if the file there says something else.
    """
    settings = json.loads(json.dumps(settings))
    if path.exists():
        stored = read_object(path)
        changed = [key for key in settings if stored.get(key) != settings[key]]
        if changed:
            raise ArgumentError(
                f"{path.parent} was made with another {', '.join(changed)}: give another --output, or delete it"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Writes the index of a folder of features, or checks the one there.

    Raises:
        ArgumentError: if the folder holds features made in another way.
    """
    write_or_check_settings(folder / "index.json", {"format": FORMAT} | index)


def shard(folder: Path, first: int) -> Path:
    """Where the shard that begins with clip `first` lies."""
    return folder / f"{first:06d}.safetensors"


def write_shard(path: Path, examples: Examples) -> None:
    """Writes a shard, all of it or nothing."""
    write_tensors(path, {field.name: getattr(examples, field.name).contiguous() for field in fields(examples)})


def load(folder: Path) -> tuple[dict[str, Any], Examples]:
    """Reads the index and all examples of a folder.

    Raises:
        ArgumentError: if there are none, or something else than described above.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths or not (folder / "index.json").exists():
        raise ArgumentError(f"{folder} must hold features (index.json and shards), got none")
    index = _index(folder / "index.json")
    return index, Examples.join([_shard(path, index) for path in paths])


def _index(path: Path) -> dict[str, Any]:
    """The index of a folder, with what training goes by."""
    index = read_object(path)
    if index.get("format") != FORMAT:
        raise ArgumentError(f"{path} must be of format {FORMAT}, got {index.get('format')!r}")
    kinds = {"labels": str, "layers": str, "heads": int, "grid": int, "timesteps": (int, float)}
    for name, kind in kinds.items():
        value = index.get(name)
        good = isinstance(value, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)
        if not good or not value:
            raise ArgumentError(f"{path} must have a list of {name}, got {value!r:.80}")
    sizes = (*index["heads"], *index["grid"])
    lengths = len(index["grid"]) == 3 and len(index["heads"]) == len(index["layers"])
    if not lengths or not all(is_whole(size, 1) for size in sizes):
        raise ArgumentError(
            f"{path} must have a number of heads for each layer and a grid of three, got {index['heads']} and "
            f"{index['grid']}"
        )
    if not isinstance(index.get("fingerprint"), dict):
        raise ArgumentError(f"{path} must have the fingerprint of a denoiser, got none")
    return index


def _shard(path: Path, index: dict[str, Any]) -> Examples:
    """The examples of a shard that is as the index says."""
    found = tensor_headers(path)
    dtypes = {"maps": "F16", "label": "I8", "asked": "I8", "source": "U8", "clip": "I64"}
    if {name: head.dtype for name, head in found.items()} != dtypes:
        raise ArgumentError(
            f"{path} must hold {', '.join(f'{name} ({dtype})' for name, dtype in dtypes.items())}, got "
            f"{', '.join(f'{name} ({head.dtype})' for name, head in sorted(found.items()))}"
        )
    maps = found["maps"].shape
    examples, entities = (maps[0], maps[2]) if len(maps) == 7 else (0, 0)
    shapes = {
        "maps": (examples, len(index["timesteps"]), entities, sum(index["heads"]), *index["grid"]),
        "label": (examples, entities),
        "asked": (examples, entities),
        "source": (examples,),
        "clip": (examples,),
    }
    read = Examples(**read_tensors(path, shapes, finite=True))
    for name, values in (("label", read.label), ("asked", read.asked)):
        if len(values) and not -1 <= int(values.min()) <= int(values.max()) < len(index["labels"]):
            raise ArgumentError(f"{path} has a {name} that is none of the {len(index['labels'])}")
    return read
