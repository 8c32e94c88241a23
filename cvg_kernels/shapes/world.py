"""The world of moving shapes: scenes, captions and frames.

A clip shows one or two objects for eight frames of 64×64 pixels on a dark ground. An object is a colour, a shape and a
direction of motion; its caption is "a red circle moving left". Everything is drawn from a seeded generator and
rendered with anti-aliased signed distances, so a clip is known exactly: where, what, which way, and how near. All
objects are of one size and differ in distance: what looks larger is nearer, and hides what is farther away.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cvg_kernels.errors import ArgumentError

FRAMES = 8
SIZE = 64
BACKGROUND = 0.08
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.1),
    "green": (0.1, 0.8, 0.2),
    "blue": (0.15, 0.3, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "purple": (0.7, 0.2, 0.9),
    "white": (1.0, 1.0, 1.0),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
#: Colour-shape pairs that no training clip shows: what a model does with them is composition, not memory.
HELD_OUT = frozenset({("purple", "circle"), ("yellow", "square"), ("blue", "triangle"), ("green", "cross")})

_RADIUS = (6.5, 9.0)  # pixels
#: Pixels a frame. At this speed an object crosses the whole picture, so where it is tells, with the frame, where it
#: goes.
SPEED = (4.5, 6.0)
_MARGIN = 1.0  # pixels kept free at the border and between two objects


@dataclass(frozen=True)
class Thing:
    """One object as the caption tells it.

    Attributes:
        colour: one of `COLOURS`.
        shape: one of `SHAPES`.
        direction: `None`: the caption says what it is and not where it goes.
    """

    colour: str
    shape: str
    direction: str | None

    def __str__(self) -> str:
        motion = "" if self.direction is None else f" moving {self.direction}"
        return f"a {self.colour} {self.shape}{motion}"


@dataclass(frozen=True)
class Motion:
    """Where a thing is: its radius, and its centre in every frame, in pixels."""

    radius: float
    centres: np.ndarray  # [F, 2] as (x, y)

    @property
    def nearness(self) -> float:
        """Inverse distance, 1 for the nearest that there is: objects of one size look smaller the farther they are."""
        return self.radius / _RADIUS[1]


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn.

    Attributes:
        things: as the caption tells them.
        motions: of each thing, as it is drawn.
    """

    things: tuple[Thing, ...]
    motions: tuple[Motion, ...]

    @property
    def caption(self) -> str:
        """The sentence that describes the clip."""
        return caption(self.things)


def caption(things: Sequence[Thing]) -> str:
    """Joins what is seen into one sentence, in the order given.

    Examples:
        >>> things = [cvg.shapes.Thing("red", "circle", "left"), cvg.shapes.Thing("blue", "square", "right")]
        >>> cvg.shapes.caption(things)
        'a red circle moving left and a blue square moving right'
    """
    return " and ".join(str(thing) for thing in things)


def parse_caption(text: str, *, motion: bool = True) -> tuple[Thing, ...]:
    """Reads the things back out of a caption.

    Args:
        text: the caption.
        motion: whether each thing must say where it moves; if not, it may.

    Raises:
        ValueError: if a part is not of the form "a COLOUR SHAPE moving DIRECTION".

    Examples:
        >>> cvg.shapes.parse_caption("a red circle moving left")
        (Thing(colour='red', shape='circle', direction='left'),)
    """
    things = []
    for part in text.strip().lower().rstrip(".").split(" and "):
        words = part.split()
        direction = words[4] if len(words) == 5 and words[3] == "moving" else None
        if (
            len(words) != (3 if direction is None else 5)
            or words[0] != "a"
            or words[1] not in COLOURS
            or words[2] not in SHAPES
            or (direction not in DIRECTIONS and (motion or direction is not None))
        ):
            form = "a COLOUR SHAPE moving DIRECTION" if motion else "a COLOUR SHAPE [moving DIRECTION]"
            raise ValueError(
                f"{part!r} is not of the form {form!r} with COLOUR of "
                f"{', '.join(COLOURS)}; SHAPE of {', '.join(SHAPES)}; DIRECTION of "
                f"{', '.join(DIRECTIONS)}"
            )
        things.append(Thing(words[1], words[2], direction))
    return tuple(things)


def pairs(held_out: bool) -> list[tuple[str, str]]:
    """The colour-shape pairs of training (`held_out=False`) or those that training never shows."""
    return [p for p in itertools.product(COLOURS, SHAPES) if (p in HELD_OUT) == held_out]


def random_things(
    rng: np.random.Generator, count: int, *, held_out: bool | None = False, distinct_shapes: bool = False
) -> tuple[Thing, ...]:
    """Draws `count` things of different colours.

    Args:
        rng: source of randomness.
        count: how many, 1 or 2.
        held_out: `False` draws from the pairs of training; `True` makes at least one thing a held-out pair; `None`
            draws from all pairs.
        distinct_shapes: also make the shapes differ.
    """
    while True:
        drawn = [
            Thing(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), str(rng.choice(list(DIRECTIONS))))
            for _ in range(count)
        ]
        new = [(thing.colour, thing.shape) in HELD_OUT for thing in drawn]
        if held_out is not None and any(new) != held_out:
            continue
        if len({thing.colour for thing in drawn}) < count:
            continue
        if distinct_shapes and len({thing.shape for thing in drawn}) < count:
            continue
        return tuple(drawn)


def random_motion(
    rng: np.random.Generator, direction: str, frames: int = FRAMES, speed: tuple[float, float] = SPEED
) -> Motion:
    """A straight path at constant speed that stays inside the frame.

    Clips longer than `FRAMES` move more slowly: the way travelled is that of a standard clip.
    """
    radius = rng.uniform(*_RADIUS)
    half_way = rng.uniform(*speed) * (FRAMES - 1) / 2
    step = np.array(DIRECTIONS[direction], dtype=np.float64)
    room = radius + _MARGIN + half_way * np.abs(step)
    middle = rng.uniform(room, SIZE - 1 - room)
    return Motion(radius, middle + np.linspace(-half_way, half_way, frames)[:, None] * step)


def _apart(first: Motion, second: Motion) -> bool:
    """Whether the bounding squares of two moving things never touch."""
    gap = np.abs(first.centres - second.centres).max(axis=1)
    return bool((gap > first.radius + second.radius + _MARGIN).all())


def _mostly_seen(first: Motion, second: Motion) -> bool:
    """Whether the centre of neither of two moving things is hidden by the other in more than half of the frames."""
    gap = np.abs(first.centres - second.centres).max(axis=1)
    return bool((gap > max(first.radius, second.radius)).mean() >= 0.5)


def random_scene(
    rng: np.random.Generator,
    things: Sequence[Thing] | None = None,
    frames: int = FRAMES,
    speed: tuple[float, float] = SPEED,
    *,
    apart: bool = True,
) -> Scene:
    """Places things; draws the things too (two of them in 2 of 3 clips) if not given.

    Args:
        rng: source of randomness.
        things: what is seen.
        frames: length of the clip.
        speed: in pixels a frame, see `random_motion`.
        apart: things never touch; if not, they may pass in front of each other, each seen in half of the frames at
            least.

    Raises:
        ArgumentError: for a thing without a direction.

    Examples:
        >>> import numpy
        >>> things = cvg.shapes.parse_caption("a red circle moving left")
        >>> cvg.shapes.random_scene(numpy.random.default_rng(1), things).caption
        'a red circle moving left'
    """
    if things is None:
        things = random_things(rng, 2 if rng.random() < 0.65 else 1)
    directions = [thing.direction for thing in things if thing.direction is not None]
    if len(directions) < len(things):
        raise ArgumentError(f"things must say where they move, got {caption(things)!r}")
    fit = _apart if apart else _mostly_seen
    while True:
        motions = [random_motion(rng, direction, frames, speed) for direction in directions]
        if all(fit(a, b) for a, b in itertools.combinations(motions, 2)):
            return Scene(tuple(things), tuple(motions))


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels to a shape's outline, negative inside, `x` and `y` measured from its centre."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * radius
    if shape == "triangle":  # apex up; the base is at y = +0.9 r, the flanks rise at slope 2
        flank = (2 * x.abs() - (y + radius)) / 5**0.5
        return torch.maximum(flank, y - 0.9 * radius)
    if shape == "cross":
        across = torch.maximum(x.abs() - radius, y.abs() - 0.36 * radius)
        upright = torch.maximum(y.abs() - radius, x.abs() - 0.36 * radius)
        return torch.minimum(across, upright)
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")


def _covers(scene: Scene, axis: torch.Tensor) -> Iterator[tuple[Thing, Motion, torch.Tensor]]:
    """The things of a scene, the farthest first, each with what it covers of every pixel, `[F, 1, H, W]` in [0, 1]."""
    for thing, motion in sorted(zip(scene.things, scene.motions, strict=True), key=lambda both: both[1].nearness):
        centres = torch.as_tensor(motion.centres, dtype=torch.float32)
        x = axis - centres[:, 0, None, None]  # [F, 1, W]
        y = axis[:, None] - centres[:, 1, None, None]  # [F, H, 1]
        x, y = torch.broadcast_tensors(x, y)
        distance = signed_distance(thing.shape, x, y, torch.tensor(motion.radius))
        yield thing, motion, (0.5 - distance).clamp(0, 1)[:, None]


def _axis(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float32) * (SIZE / size)


def render(scenes: Sequence[Scene], size: int = SIZE) -> torch.Tensor:
    """Draws scenes as float32 `[B, F, 3, size, size]` in [0, 1].

    Examples:
        >>> import numpy
        >>> scene = cvg.shapes.random_scene(numpy.random.default_rng(1), frames=8)
        >>> cvg.shapes.render([scene]).shape
        torch.Size([1, 8, 3, 64, 64])
    """
    frames = len(scenes[0].motions[0].centres)
    video = torch.full((len(scenes), frames, 3, size, size), BACKGROUND)
    for clip, scene in zip(video, scenes, strict=True):
        for thing, _, cover in _covers(scene, _axis(size)):
            colour = torch.tensor(COLOURS[thing.colour])[:, None, None]
            clip.mul_(1 - cover).add_(cover * colour)
    return video


def render_depth(scenes: Sequence[Scene], size: int = SIZE) -> torch.Tensor:
    """Draws how near things are, float32 `[B, F, size, size]`: inverse distance, 1 the nearest and 0 the ground."""
    frames = len(scenes[0].motions[0].centres)
    depth = torch.zeros(len(scenes), frames, size, size)
    for clip, scene in zip(depth, scenes, strict=True):
        for _, motion, cover in _covers(scene, _axis(size)):
            clip.mul_(1 - cover[:, 0]).add_(cover[:, 0] * motion.nearness)
    return depth
