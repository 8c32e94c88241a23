"""Edits to be made, and what the oracle reads of one:
is the content there that was asked for, is the structure kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cvg_kernels.shapes.oracle import Seen, frame_consistency, look
from cvg_kernels.shapes.train_content import still
from cvg_kernels.shapes.world import HELD_OUT, Scene, Thing, caption, pairs, random_scene, render

_SPEED = (2.0, 6.0)  # pixels a frame: every direction can be read
SCORES = ("colour", "shape", "direction", "found")


@dataclass(frozen=True)
class EditTask:
    """A clip and what it shall show instead.

    Attributes:
        scene: scene of the clip.
        clip: `[F, 3, H, W]` in [0, 1].
        asked: other things, without a motion.
        picture: `[3, H, W]`, a frame of another scene with the things that are asked for.
    """

    scene: Scene
    clip: torch.Tensor
    asked: tuple[Thing, ...]
    picture: torch.Tensor

    @property
    def prompt(self) -> str:
        """The content in words."""
        return caption(self.asked)

    @property
    def prompt_with_motion(self) -> str:
        """The content and the clip's own motion in words, for a model that is told nothing else."""
        both = zip(self.asked, self.scene.things, strict=True)
        return caption([Thing(a.colour, a.shape, s.direction) for a, s in both])


def edit_tasks(count: int, seed: int, *, things: int = 1, held_out: bool = False) -> list[EditTask]:
    """Draws edits: each thing is to take a colour that is not in the clip, and another shape.

    Args:
        count: how many; task i depends on the seed and i alone.
        seed: random seed of the draw. Reported results use seed 0; what was chosen was chosen on others.
        things: in a clip, 1 or 2.
        held_out: whether what is asked for is a pair of colour and shape that no training clip shows.
    """
    return [
        _task(np.random.default_rng((seed, 6, number, things, held_out)), things, held_out) for number in range(count)
    ]


def _task(rng: np.random.Generator, things: int, held_out: bool) -> EditTask:
    while True:
        scene = random_scene(rng, _things(rng, things, False), speed=_SPEED)
        asked = _things(rng, things, held_out)
        colours = {one.colour for one in (*asked, *scene.things)}
        others = all(a.shape != s.shape for a, s in zip(asked, scene.things, strict=True))
        if len(colours) == 2 * things and others:
            break
    shown = random_scene(rng, asked, frames=1)
    return EditTask(scene, render([scene])[0], tuple(still(one) for one in asked), render([shown])[0, 0])


def _things(rng: np.random.Generator, count: int, held_out: bool) -> tuple[Thing, ...]:
    """Things of different colours and shapes; all held-out pairs, or none."""
    directions = ("left", "right", "up", "down")
    known = sorted(HELD_OUT) if held_out else pairs(held_out=False)
    while True:
        drawn = [known[number] for number in rng.integers(len(known), size=count)]
        if len({colour for colour, _ in drawn}) == len({shape for _, shape in drawn}) == count:
            return tuple(Thing(*pair, str(rng.choice(directions))) for pair in drawn)


@dataclass(frozen=True)
class EditVerdict:
    """What was read of an edit, a mean over its things.

    Attributes:
        colour: the asked colour is seen.
        shape: the asked shape is seen in the asked colour.
        direction: what took the thing's place moves as it did.
        found: something took the thing's place.
        distance: pixels between its centre and that of the thing, a mean over the frames where it is seen; `None` if
            nothing was found.
        consistency: consistency of neighbouring frames, see `oracle.frame_consistency`.
    """

    colour: float
    shape: float
    direction: float
    found: float
    distance: float | None
    consistency: float


def _distance(seen: Seen, centres: np.ndarray) -> float:
    return float(np.nanmean(np.linalg.norm(seen.centres - centres, axis=1)))


def judge_edit(frames: torch.Tensor, task: EditTask) -> EditVerdict:
    """Reads an edit.

    Nothing says which of two things takes whose place: what counts is the assignment that is nearest. What took a
    thing's place is the object of the asked colour, or, if there is none, the nearest of those in no asked colour.

    Args:
        frames: `[F, 3, 64, 64]` in [0, 1].
        task: what was asked for.
    """
    seen = look(frames)
    tables = (_compared(seen, order, task) for order in itertools.permutations(range(len(task.asked))))

    def far(table: list[tuple]) -> tuple[int, float]:
        distances = [row[-1] for row in table]
        return distances.count(None), sum(one for one in distances if one is not None)

    *rates, distances = zip(*min(tables, key=far), strict=True)
    known = [one for one in distances if one is not None]
    return EditVerdict(
        *(float(np.mean(each)) for each in rates),
        distance=float(np.mean(known)) if known else None,
        consistency=frame_consistency(frames),
    )


def _compared(seen: Sequence[Seen], order: Sequence[int], task: EditTask) -> list[tuple]:
    """Colour, shape, direction, found and distance of each asked thing,
    if the i-th takes the place of thing order[i].
    """
    by_colour = {one.colour: one for one in seen}
    rest = [one for one in seen if one.colour not in {thing.colour for thing in task.asked}]
    table = []
    for asked, number in zip(task.asked, order, strict=True):
        thing, motion = task.scene.things[number], task.scene.motions[number]
        right = by_colour.get(asked.colour)
        taken = right
        if taken is None and rest:
            taken = min(rest, key=lambda one: _distance(one, motion.centres))
            rest.remove(taken)
        table.append(
            (
                right is not None,
                right is not None and right.shape == asked.shape,
                taken is not None and taken.direction == thing.direction,
                taken is not None,
                None if taken is None else _distance(taken, motion.centres),
            )
        )
    return table


def judge_edits(frames: Sequence[torch.Tensor], tasks: Sequence[EditTask]) -> list[EditVerdict]:
    """Reads edits, one a task."""
    return [judge_edit(clip, task) for clip, task in zip(frames, tasks, strict=True)]
