"""What a training run tells: a progress bar and a file of losses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

import torch

from cvg_kernels.writing import append_line

_EVERY = 50  # steps


class TrainingLog:
    """Shows a progress bar and appends the mean loss of every 50 steps to `folder/metrics.jsonl`.

    Args:
        folder: the run's folder.
        stage: the name shown and written.
        first: the step that the run begins with, not 0 when it is resumed.
        steps: the number of steps at the end.
        silent: writes and shows nothing; for all processes but one.
    """

    def __init__(self, folder: Path, stage: str, first: int, steps: int, *, silent: bool = False) -> None:
        self.path = folder / "metrics.jsonl"
        self.stage = stage
        self.done = first
        self.silent = silent
        self._losses: list[torch.Tensor] = []
        self._since = time.monotonic()
        if not silent:
            from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

            self._bar = Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
            self._task = self._bar.add_task(stage, total=steps, completed=first)

    def __enter__(self) -> TrainingLog:
        if not self.silent:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.silent:
            self._bar.stop()

    def step(self, loss: torch.Tensor) -> None:
        """Counts one step with its loss; the value is read every 50 steps only, so a GPU is not held up."""
        if self.silent:
            return
        self.done += 1
        self._losses.append(loss.detach())
        self._bar.update(self._task, completed=self.done)
        if self.done % _EVERY == 0:
            now = time.monotonic()
            line = {
                "stage": self.stage,
                "step": self.done,
                "loss": torch.stack(self._losses).mean().item(),
                "seconds_per_step": (now - self._since) / len(self._losses),
            }
            append_line(self.path, json.dumps(line))
            self._losses, self._since = [], now
