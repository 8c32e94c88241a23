"""Checkpoints that a stopped training run continues from: safetensors, and what is no tensor as JSON in their head."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.reading import metadata_of, parse_json, read_tensors
from cvg_kernels.writing import write_tensors

FORMAT = "1"


class Checkpoint:
    """The state of a training stage in one file, replaced atomically so that a stop at any moment loses little.

    Args:
        path: the file.
        **parts: what to save: anything with `state_dict` and `load_state_dict`.
    """

    def __init__(self, path: Path, **parts: Any) -> None:
        self.path = path
        self.parts = parts
        self._saved_at = time.monotonic()

    def resume(self) -> int:
        """Loads the newest state, if there is one, and returns the number of steps already done.

        Raises:
            ArgumentError: for a file that is no checkpoint of these parts.
        """
        if not self.path.exists():
            older = self.path.with_suffix(".pt")
            if older.exists():
                raise ArgumentError(
                    f"{older} is a pickled checkpoint, which is not loaded: delete it to begin this stage anew"
                )
            return 0
        state = _read(self.path)
        if set(state) != {"step", *self.parts} or type(state["step"]) is not int:
            raise ArgumentError(
                f"{self.path} must be a checkpoint of {', '.join(self.parts)}, got one of "
                f"{', '.join(sorted(set(state) - {'step'}))}"
            )
        for name, part in self.parts.items():
            try:
                part.load_state_dict(state[name])
            except Exception as error:  # a part says in its own way that a state is not its own
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise ArgumentError(
                    f"{self.path} is the checkpoint of another {name}, delete it to begin this stage anew: {reason}"
                ) from error
        return state["step"]

    def save(self, step: int) -> None:
        """Writes the state after `step` steps."""
        state = {"step": step, **{name: part.state_dict() for name, part in self.parts.items()}}
        tensors: dict[str, torch.Tensor] = {}
        tree = _without_tensors(state, tensors)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path, tensors, {"format": FORMAT, "state": json.dumps(tree)})
        self._saved_at = time.monotonic()

    def save_sometimes(self, step: int, seconds: float = 60.0) -> None:
        """Writes the state if the last writing is more than `seconds` ago."""
        if time.monotonic() - self._saved_at > seconds:
            self.save(step)


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A state as JSON: tensors as their number in `tensors`, which they are put into; keys may be any plain value."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _without_tensors(one, tensors)] for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        each = [_without_tensors(one, tensors) for one in value]
        return {"tuple": each} if isinstance(value, tuple) else each
    if isinstance(value, float):
        return {"float": value.hex()}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, got {type(value).__name__}")


def _with_tensors(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The other way round."""
    if isinstance(tree, list):
        return [_with_tensors(one, tensors) for one in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _with_tensors(one, tensors) for key, one in value}
    if kind == "tuple":
        return tuple(_with_tensors(one, tensors) for one in value)
    if kind == "float":
        return float.fromhex(value)
    raise ValueError(f"there is no kind {kind!r}")


def _read(path: Path) -> dict[str, Any]:
    """The state in a file.

    Raises:
        ArgumentError: if it is no checkpoint.
    """
    told = metadata_of(path)
    if told.get("format") != FORMAT or "state" not in told:
        raise ArgumentError(f"{path} must be a checkpoint of format {FORMAT}, got {told.get('format')!r}")
    tensors = read_tensors(path)
    try:
        state = _with_tensors(parse_json(told["state"], path), tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArgumentError(f"{path} must be a checkpoint, got another file: {error}") from None
    if not isinstance(state, dict):
        raise ArgumentError(f"{path} must be a checkpoint, got a file of {type(state).__name__}")
    return state
