"""Where a run of a pipeline stands: which of the steps that it really makes a denoiser call belongs to."""

from __future__ import annotations

from typing import Any

import torch

from cvg_kernels.pipeline.schedulers import Place, places_of

#: Two timesteps within this share of each other are one: some pipelines cast them to bfloat16.
_SAME = 2.0**-7


class Schedule:
    """Follows a scheduler through one run of a pipeline.

    Steps count from the first that the run makes: video-to-video pipelines leave out those at the front. Both calls of
    a two-call step (Heun) are one step.

    Args:
        scheduler: the pipeline's, with its timesteps set.

    Attributes:
        section: how often the run has gone back to the beginning of a schedule: long videos are made section by
            section.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.section = 0
        self._read()

    def _read(self) -> None:
        self._source = getattr(self._scheduler, "timesteps", None)
        self._timesteps = _floats(self._source)
        self._start = 0  # the entry that the run begins at
        self._places: list[Place] = []  # of the entries from there on
        self._position: int | None = None  # of the coming call of `scheduler.step`; None: not begun

    def locate(self, timestep: float) -> tuple[int, int, bool]:
        """Says where a denoiser call stands.

        Args:
            timestep: timestep of the call.

        Returns:
            The number of its step, 0 first; how many steps the run makes; whether latents may be moved at this call.
        """
        source = getattr(self._scheduler, "timesteps", None)
        if source is not self._source and _floats(source) != self._timesteps:
            self.section += self._position is not None
            self._read()  # several stages in one run: each has its own steps
        self._source = source
        if not self._timesteps:
            return self._position or 0, (self._position or 0) + 1, True
        if self._position is None or not self._stands_at(timestep):
            self._begin(timestep)
        place = self._places[self._position - self._start]
        return place.step, self._places[-1].step + 1, place.leading

    def advance(self) -> None:
        """Notes that the scheduler has made a step (or a half)."""
        self._position = (self._position or 0) + 1

    def _stands_at(self, timestep: float) -> bool:
        """Whether a call with this timestep may come next."""
        if self._position >= len(self._timesteps):
            return False
        expected = self._timesteps[self._position]
        if _same(timestep, expected):
            return True
        # Not the scheduler's numbers at all (a pipeline that scales them): then counting is what is left.
        return not any(_same(timestep, known) for known in self._timesteps)

    def _begin(self, timestep: float) -> None:
        """Finds the entry of the schedule that a run begins at, or begins anew at."""
        matches = [index for index, known in enumerate(self._timesteps) if known == timestep] or [
            index for index, known in enumerate(self._timesteps) if _same(timestep, known)
        ]
        places = places_of(self._scheduler)
        leading = [index for index in matches if places[index].leading] or matches
        begin = leading[0] if leading else getattr(self._scheduler, "begin_index", None) or 0
        self.section += self._position is not None and begin < self._position
        self._start = self._position = min(begin, len(self._timesteps) - 1)
        self._places = places_of(self._scheduler, self._start)


def _floats(timesteps: Any) -> list[float]:
    return [] if timesteps is None else torch.as_tensor(timesteps).tolist()


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= _SAME * max(abs(one), abs(other))
