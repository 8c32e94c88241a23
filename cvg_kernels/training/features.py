"""Features of a world's clips: made in shards that a killed run keeps, with what is true of every entity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

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


def make_shards(
    folder: Path,
    pipe: VideoPipeline,
    *,
    labels: Sequence[str],
    grid: tuple[int, int, int],
    steps: int,
    read_steps: int,
    recipe: dict[str, Any],
    parts: Iterable[range],
    make: Callable[[Selection, range], Examples],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Makes features shard by shard; those that exist are kept.

    Args:
        folder: where to keep them, as `store` describes.
        pipe: the world's pipeline.
        labels: what can be true of an entity.
        grid: frames, rows and columns of the features.
        steps: steps of the sampler.
        read_steps: how many of the first are read.
        recipe: how the clips are drawn; a folder made in another way is refused.
        parts: clip numbers, a shard each.
        make: makes the examples of some clip numbers.
        progress: called with the number of clips done in a shard.

    Raises:
        ArgumentError: if the folder holds features made in another way.
    """
    unet: Any = pipe.unet
    selection = Selection.of(unet, grid)
    pipe.scheduler.set_timesteps(steps)
    write_index(
        folder,
        {
            "labels": labels,
            "timesteps": [float(timestep) for timestep in pipe.scheduler.timesteps[:read_steps]],
            "layers": selection.layers,
            "heads": selection.heads,
            "grid": selection.grid,
            "fingerprint": fingerprint(unet, selection.layers),
            "recipe": recipe,
        },
    )
    for numbers in parts:
        path = shard(folder, numbers[0])
        if not path.exists():
            write_shard(path, make(selection, numbers))
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
