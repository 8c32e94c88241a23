"""Features of a world's clips: made in shards that a killed run keeps, with what is true of every entity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from cvg_kernels.composition.entities import entities_of
from cvg_kernels.composition.features import Selection
from cvg_kernels.composition.fingerprint import fingerprint
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.training.record import record
from cvg_kernels.training.store import Examples, shard, write_index, write_shard

BATCH = 10  # clips in a shard


def batches(*ends: int) -> list[range]:
    """Clip numbers that are made together: none of two kinds, which end at the numbers given."""
    begins = (0, *ends[:-1])
    return [
        range(first, min(first + BATCH, end))
        for begin, end in zip(begins, ends, strict=True)
        for first in range(begin, end, BATCH)
    ]


class Clips(Protocol):
    """Which clips of a world are made, and what is true of them: a dataclass, whose fields are the recipe."""

    @property
    def read_steps(self) -> int:
        """How many of the first steps are read."""
        ...

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        ...

    @property
    def labels(self) -> Sequence[str]:
        """What can be true of an entity."""
        ...

    @property
    def ends(self) -> tuple[int, ...]:
        """The number at which each kind of clips ends; the last is how many there are."""
        ...

    def grid(self, pipe: VideoPipeline) -> tuple[int, int, int]:
        """Frames, rows and columns of the features."""
        ...

    def make(self, pipe: VideoPipeline, selection: Selection, numbers: range) -> Examples:
        """Makes the examples of some clips, all of a kind; each depends on the recipe and its number alone."""
        ...


def make_features(
    folder: Path,
    pipe: VideoPipeline,
    clips: Clips,
    *,
    rank: int = 0,
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Makes this process's share of the features, shard by shard; those that exist are kept.

    Args:
        folder: where to keep them, as `store` describes.
        pipe: the world's pipeline.
        clips: which; a folder made of others is refused.
        rank: number of this process.
        processes: how many share the work.
        progress: called with the number of clips done in a shard.

    Raises:
        ArgumentError: if the folder holds features made in another way.
    """
    unet: Any = pipe.unet
    selection = Selection.of(unet, clips.grid(pipe))
    pipe.scheduler.set_timesteps(clips.steps)
    write_index(
        folder,
        {
            "labels": clips.labels,
            "timesteps": [float(timestep) for timestep in pipe.scheduler.timesteps[: clips.read_steps]],
            "layers": selection.layers,
            "heads": selection.heads,
            "grid": selection.grid,
            "fingerprint": fingerprint(unet, selection.layers),
            "recipe": vars(clips),
        },
    )
    for numbers in batches(*clips.ends)[rank::processes]:
        path = shard(folder, numbers[0])
        if not path.exists():
            write_shard(path, clips.make(pipe, selection, numbers))
        if progress is not None:
            progress(len(numbers))


def record_entities(
    pipe: VideoPipeline, prompts: list[str], labels: Sequence[str], selection: Selection, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The maps of the entities of prompts in a run's first steps, and the frames if asked for; see `record`."""
    phrases = [[entity.phrase for entity in entities_of(prompt, labels)] for prompt in prompts]
    maps, _, frames = record(pipe, prompts, phrases, selection, **options)
    return maps, frames


def examples_of(
    maps: torch.Tensor,
    true: Sequence[Sequence[int]],
    asked: Sequence[Sequence[int]],
    *,
    entities: int,
    source: int,
    numbers: range,
) -> Examples:
    """Puts maps and labels together, padded to a number of entities.

    Args:
        maps: `[N, T, E, M, F, h, w]`.
        true: numbers of the labels that are true, clip by clip; −1: not known.
        asked: those that the prompts name.
        entities: the most that any clip has.
        source: as `store` has it.
        numbers: of the clips.
    """
    padded = maps.new_zeros(*maps.shape[:2], entities, *maps.shape[3:])
    padded[:, :, : maps.shape[2]] = maps

    def table(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([[*row, *[-1] * (entities - len(row))] for row in rows], dtype=torch.int8)

    return Examples(
        padded.half(),
        table(true),
        table(asked),
        torch.full((len(numbers),), source, dtype=torch.uint8),
        torch.tensor(numbers),
    )
