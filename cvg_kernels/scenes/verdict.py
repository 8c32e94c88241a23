"""What of a caption is true of a clip, and how the rest fails: dropped, merged, swapped, or wrong in some way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cvg_kernels.scenes.captions import Caption, Thing
from cvg_kernels.scenes.oracle import Seen

#: The ways in which a thing that is named can fail; "right" is none of them.
FAILURES = ("dropped", "merged", "swapped", "wrong colour", "wrong shape", "wrong count", "wrong size", "wrong motion")
_SMALL, _BIG = (6.4, 7.2)  # pixels of radius: what is called small has less, what is called big has more


@dataclass(frozen=True)
class Verdict:
    """What a clip shows of a caption.

    Attributes:
        things: how each thing named ended, "right" or one of `FAILURES`.
        relation: whether the first stands as the caption says; `None` if it says nothing, or one of both is not shown.
        extra: objects that the caption does not name.
    """

    things: tuple[str, ...]
    relation: bool | None
    extra: int

    @property
    def shown(self) -> tuple[bool, ...]:
        """Of each thing, whether its shape is there in its colour."""
        visible = ("right", "wrong count", "wrong size", "wrong motion")
        return tuple(one in visible for one in self.things)

    @property
    def all_shown(self) -> bool:
        """Whether every thing is there."""
        return all(self.shown)

    @property
    def all_right(self) -> bool:
        """Whether everything that the caption says is true."""
        return all(one == "right" for one in self.things) and self.relation is not False


def judge(seen: Sequence[Seen], caption: Caption) -> Verdict:
    """Compares what the oracle saw with a caption.

    A thing is shown if its shape is there in its colour; then its number, size and motion are asked for as far as the
    caption says them. One that is not shown failed by what is seen in its place, and each of these explains one
    failure: a blob of its colour without an outline (merged); its colour with a shape, or its shape with a colour,
    that the caption names for another thing (swapped); its colour with another shape, or its shape in another colour;
    or nothing (dropped).
    """
    named = {(thing.colour, thing.shape) for thing in caption.things}
    unnamed = [one for one in seen if (one.colour, one.shape) not in named]
    extra = len(unnamed)
    things = []
    for thing in caption.things:
        found = [one for one in seen if (one.colour, one.shape) == (thing.colour, thing.shape)]
        things.append(_of_shown(thing, found) if found else _of_missing(thing, caption, unnamed))
    relation = None
    if caption.relation is not None:
        first, second = (
            [one for one in seen if (one.colour, one.shape) == (thing.colour, thing.shape)] for thing in caption.things
        )
        if first and second:
            relation = relation_holds(first[0], second[0], caption.relation)
    return Verdict(tuple(things), relation, extra)


def _of_shown(thing: Thing, found: Sequence[Seen]) -> str:
    if len(found) != thing.count:
        return "wrong count"
    if thing.size == "small" and any(one.radius > _SMALL for one in found):
        return "wrong size"
    if thing.size == "big" and any(one.radius < _BIG for one in found):
        return "wrong size"
    if thing.direction is not None and any(one.direction != thing.direction for one in found):
        return "wrong motion"
    if thing.speed is not None and any(one.speed != thing.speed for one in found):
        return "wrong motion"
    return "right"


def _of_missing(thing: Thing, caption: Caption, unnamed: list[Seen]) -> str:
    others = [one for one in caption.things if one is not thing]
    shapes, colours = {one.shape for one in others}, {one.colour for one in others}
    ways = {
        "merged": lambda one: one.colour == thing.colour and one.shape is None,
        "swapped": lambda one: (
            (one.colour == thing.colour and one.shape in shapes)
            or (one.shape == thing.shape and one.colour in colours)
        ),
        "wrong shape": lambda one: one.colour == thing.colour,
        "wrong colour": lambda one: one.shape == thing.shape,
    }
    for name, fits in ways.items():
        for one in unnamed:
            if fits(one):
                unnamed.remove(one)
                return name
    return "dropped"


def relation_holds(first: Seen, second: Seen, relation: str) -> bool:
    """Whether the first object stands as said to the second in more than half of the frames that show both.

    Beside: farther to that side than in the other direction. Behind: it is the smaller, that is the farther one, and
    the second's bounding square covers some of its own.
    """
    way = second.centres - first.centres
    way = way[~np.isnan(way).any(1)]
    if not len(way):
        return False
    if relation == "behind":
        overlap = np.clip(first.radius + second.radius - np.abs(way), 0, None).prod(axis=1)
        holds = (overlap > 0.04 * (2 * first.radius) ** 2) & (first.radius < second.radius)
    else:
        axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
        holds = sign * way[:, axis] > np.abs(way[:, 1 - axis])
    return bool(holds.mean() > 0.5)
