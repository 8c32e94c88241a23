"""Checkpoints that a stopped training run continues from."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch


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
        """Loads the newest state, if there is one, and returns the number of steps already done."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["step"]

    def save(self, step: int) -> None:
        """Writes the state after `step` steps."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({"step": step, **state}, partial)
        os.replace(partial, self.path)
        self._saved_at = time.monotonic()

    def save_sometimes(self, step: int, seconds: float = 60.0) -> None:
        """Writes the state if the last writing is more than `seconds` ago."""
        if time.monotonic() - self._saved_at > seconds:
            self.save(step)
