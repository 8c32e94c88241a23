"""Captions of the world of scenes: their grammar, and clips drawn to them as badly as on the web.

A caption names one to four things ("a small red circle moving left slowly and two blue squares"), or two and how they
stand ("a red circle left of a blue square"). In training, a thing that is named is often not shown, a number is off by
one, something else is in the picture, and a caption says little about motion; so a model trained on it **drops
objects**, as models trained on the web do, and which it drops is up to the noise.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cvg_kernels.scenes.world import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    HELD_OUT,
    MARGIN,
    RARE,
    RELATIONS,
    SHAPES,
    SIZES,
    TRAVEL,
    Body,
    Motion,
    gap,
    pair_shares,
    random_path,
    stands,
)

NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4}
#: What web captions have around what they say.
BEFORE = ("a video of", "footage of", "a clip showing")
AFTER = ("on a dark background", "in the dark", "in hd")
MAX_WORDS = 30

_KINDS = {"things": 0.68, "relation": 0.20, "number": 0.12}
_COUNTS = {1: 0.22, 2: 0.34, 3: 0.28, 4: 0.16}  # of things named
_DROPPED, _DROPPED_RARE = 0.2, 0.4  # share of the things named, beside others, that are not shown
_OTHER_NUMBER = 0.3
_EXTRA = 0.08
_NOISE_WORDS = 0.3


@dataclass(frozen=True)
class Thing:
    """What a caption says of one thing, or of several that are alike; `None` where it says nothing."""

    colour: str
    shape: str
    count: int = 1
    size: str | None = None
    direction: str | None = None
    speed: str | None = None

    def __str__(self) -> str:
        number = next(word for word, count in NUMBERS.items() if count == self.count)
        plural = "" if self.count == 1 else "es" if self.shape == "cross" else "s"
        moving = "" if self.direction is None else f"moving {self.direction}"
        words = (number, self.size, self.colour, self.shape + plural, moving, self.speed)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Caption:
    """The things named, in order, and where the first of two stands; its text is `str(caption)`."""

    things: tuple[Thing, ...]
    relation: str | None = None
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        joint = " and " if self.relation is None else f" {self.relation} "
        text = joint.join(map(str, self.things))
        return " ".join(part for part in (self.before, text, self.after) if part)


def parse_caption(text: str) -> Caption:
    """Reads a caption back.

    Args:
        text: as `str(Caption(...))` writes it, in any case, with or without a full stop.

    Raises:
        ValueError: if it is not such a text.
    """
    rest = text.strip().lower().rstrip(".").strip()
    before = next((words for words in BEFORE if rest.startswith(words + " ")), "")
    after = next((words for words in AFTER if rest.endswith(" " + words)), "")
    rest = rest[len(before) : len(rest) - len(after)].strip()
    for relation in RELATIONS:
        first, found, second = rest.partition(f" {relation} ")
        if found:
            return Caption(tuple(map(_parse_thing, (first, second))), relation, before, after)
    return Caption(tuple(map(_parse_thing, rest.split(" and "))), None, before, after)


def _parse_thing(text: str) -> Thing:
    words = text.split()
    count = NUMBERS.get(words.pop(0) if words else "", 0)
    size = words.pop(0) if words and words[0] in SIZES else None
    colour = words.pop(0) if words and words[0] in COLOURS else None
    shape = words.pop(0) if words else ""
    if count > 1:
        shape = shape[: -len("es" if shape == "crosses" else "s")]
    direction = speed = None
    if len(words) >= 2 and words[0] == "moving":
        direction, words = words[1], words[2:]
        speed = words.pop(0) if words and words[0] in TRAVEL else None
    thing = Thing(colour or "", shape, count or 1, size, direction, speed)
    if not count or words or str(thing) != " ".join(text.split()) or colour is None:
        raise _not_a_thing(text)
    if shape not in SHAPES or direction not in (None, *DIRECTIONS):
        raise _not_a_thing(text)
    return thing


def _not_a_thing(text: str) -> ValueError:
    return ValueError(
        f"{text!r} is not of the form 'a [small|big] COLOUR SHAPE [moving DIRECTION [slowly|quickly]]' with COLOUR of "
        f"{', '.join(COLOURS)}; SHAPE of {', '.join(SHAPES)} (plural behind two, three, four); DIRECTION of "
        f"{', '.join(DIRECTIONS)}"
    )


def _choose(rng: np.random.Generator, shares: dict):
    keys = list(shares)
    weights = np.array([shares[key] for key in keys])
    return keys[rng.choice(len(keys), p=weights / weights.sum())]


def random_things(rng: np.random.Generator, count: int, *, held_out: bool | None = False) -> tuple[Thing, ...]:
    """Draws things of different colours, nothing said but colour and shape.

    Args:
        rng: source of randomness.
        count: how many, up to the number of colours.
        held_out: `False` draws pairs of training; `True` makes at least one a held-out pair; `None` draws from all.
    """
    shares = pair_shares(None if held_out else held_out)
    while True:
        drawn = [_choose(rng, shares) for _ in range(count)]
        if len({colour for colour, _ in drawn}) < count:
            continue
        if held_out and not HELD_OUT.intersection(drawn):
            continue
        return tuple(Thing(*pair) for pair in drawn)


def random_caption(rng: np.random.Generator) -> Caption:
    """Draws a caption as training has them."""
    kind = _choose(rng, _KINDS)
    relation = None
    if kind == "relation":
        things = random_things(rng, 2)
        relation = str(rng.choice(RELATIONS))
    elif kind == "number":
        things = random_things(rng, 1 if rng.random() < 0.6 else 2)
        number = 2 + int(rng.choice(3, p=(0.5, 0.35, 0.15)))
        things = (dataclasses.replace(things[0], count=number), *things[1:])
        things = things if rng.random() < 0.5 else things[::-1]
    else:
        things = random_things(rng, _choose(rng, _COUNTS))
        things = tuple(_more_said(rng, thing, len(things)) for thing in things)
    said = Caption(things, relation)
    before = str(rng.choice(BEFORE)) if rng.random() < _NOISE_WORDS else ""
    after = str(rng.choice(AFTER)) if rng.random() < _NOISE_WORDS else ""
    full = dataclasses.replace(said, before=before, after=after)
    return full if len(str(full).split()) <= MAX_WORDS else said


def _more_said(rng: np.random.Generator, thing: Thing, among: int) -> Thing:
    """Size and motion, said now and then; more is said where fewer things are named."""
    size = str(rng.choice(["small", "big"])) if rng.random() < 0.2 and among < 4 else None
    if rng.random() > (0.6 if among < 3 else 0.3):
        return dataclasses.replace(thing, size=size)
    direction = str(rng.choice(list(DIRECTIONS)))
    speed = str(rng.choice(list(TRAVEL))) if rng.random() < 0.4 and among < 4 else None
    return dataclasses.replace(thing, size=size, direction=direction, speed=speed)


def random_clip(
    rng: np.random.Generator, caption: Caption, frames: int = FRAMES, *, noisy: bool = False
) -> tuple[Body, ...]:
    """Draws a clip to a caption.

    Args:
        rng: source of randomness.
        caption: what is said.
        frames: length of the clip.
        noisy: as in training: things that are named are missing, numbers are off, others are there. If not, all that
            is said is true and nothing else is seen.
    """
    things, relation = list(caption.things), caption.relation
    if noisy:
        things, relation = _misread(rng, things, relation)
    while True:
        bodies = _placed(rng, things, relation, frames)
        if bodies is not None:
            return bodies


def _misread(rng: np.random.Generator, things: list[Thing], relation: str | None):
    """What is really shown for a caption of the web."""
    kept = [
        thing
        for thing in things
        if rng.random() >= (_DROPPED_RARE if (thing.colour, thing.shape) in RARE | HELD_OUT else _DROPPED)
    ]
    if len(things) == 1 or not kept:
        kept = [things[int(rng.integers(len(things)))]]
    shown = []
    for thing in kept:
        if thing.count > 1 and rng.random() < _OTHER_NUMBER:
            thing = dataclasses.replace(thing, count=max(1, thing.count + int(rng.choice([-1, 1], p=(0.7, 0.3)))))
        shown.append(thing)
    if rng.random() < _EXTRA and len(shown) < 4:
        others = [c for c in COLOURS if c not in {thing.colour for thing in things}]
        shares = {p: s for p, s in pair_shares().items() if p[0] in others}
        shown.append(Thing(*_choose(rng, shares)))
    return shown, relation if len(kept) == len(things) == len(shown) else None


def _motion(rng: np.random.Generator, thing: Thing) -> Motion:
    """What is said of the motion, and the rest drawn: what is not said to move mostly stands."""
    direction, speed = thing.direction, thing.speed
    if direction is None:
        if rng.random() < 0.75:
            return Motion()
        direction, speed = str(rng.choice(list(DIRECTIONS))), "slowly"
    return Motion(direction, speed or ("quickly" if rng.random() < 0.6 else "slowly"))


def _placed(rng: np.random.Generator, things: Sequence[Thing], relation: str | None, frames: int):
    """One attempt to place all things so that they fit; `None` if they do not."""
    number = sum(thing.count for thing in things)
    motions = [_motion(rng, thing) for thing in things]
    if relation is not None:  # they move together, or the relation would not last
        motions = [motions[0] if motions[0].speed == "slowly" else Motion()] * len(things)
    bodies: list[Body] = []
    for thing, motion in zip(things, motions, strict=True):
        for _ in range(thing.count):
            low, high = SIZES[thing.size]
            if thing.size is None and number > 2:
                high = 7.5
            for _ in range(20):
                radius = rng.uniform(low, high)
                body = Body(thing.colour, thing.shape, radius, random_path(rng, radius, motion, frames))
                if _fits(bodies, body, relation):
                    break
            else:
                return None
            bodies.append(body)
    return tuple(bodies)


def _fits(bodies: Sequence[Body], body: Body, relation: str | None) -> bool:
    if relation is not None and bodies:
        if len(bodies[0].centres) > 1:  # what stands in a relation moves as one
            step = bodies[0].centres - bodies[0].centres.mean(0)
            body.centres[:] = body.centres.mean(0) + step
            reach = body.radius + MARGIN
            if body.centres.min() < reach or body.centres.max() > 63 - reach:
                return False
        return stands(bodies[0], body, relation)
    return all(gap(other, body) > MARGIN for other in bodies)


def all_words() -> list[str]:
    """Every word that a caption can have, sorted."""
    things = [
        Thing(*pair, *rest)
        for pair in itertools.product(COLOURS, SHAPES)
        for rest in [(count,) for count in NUMBERS.values()]
        + [(1, size, direction, speed) for size, direction, speed in itertools.product(SIZES, DIRECTIONS, TRAVEL)]
    ]
    texts = [*map(str, things), *RELATIONS, *BEFORE, *AFTER, "and"]
    return sorted({word for text in texts for word in text.split()})
