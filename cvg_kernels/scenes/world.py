"""The world of scenes: what a clip can show, drawn and rendered exactly.

A clip shows up to five coloured shapes for eight frames of 64×64 pixels on a dark ground. They stand, or move slowly
or quickly; one may stand left of, above or behind another; several may be alike. Everything is drawn from a seeded
generator and rendered with anti-aliased signed distances. All objects are of one true size and differ in distance:
what looks larger is nearer, and hides what is farther away. What a caption says of a clip is in `captions`, and it
need not be all true.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

FRAMES = 8
SIZE = 64
BACKGROUND = 0.08
#: So far apart that no mixture of two is nearer to a third than an oracle could tell.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.12, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "green": (0.1, 0.7, 0.15),
    "yellow": (1.0, 0.9, 0.1),
    "white": (1.0, 1.0, 1.0),
    "cyan": (0.1, 0.9, 0.95),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RELATIONS = ("left of", "right of", "above", "below", "behind")
#: Radius in pixels of what is called small, of anything, and of what is called big.
SIZES: dict[str | None, tuple[float, float]] = {"small": (5.0, 5.8), None: (5.0, 9.0), "big": (7.8, 9.0)}
#: Pixels from the first to the last of eight frames. A slow object stays within two cells of 4 pixels for half a clip.
TRAVEL: dict[str, tuple[float, float]] = {"slowly": (7.0, 11.0), "quickly": (22.0, 30.0)}
#: How often each is drawn: the world is as uneven as the web.
COLOUR_SHARE = dict(zip(COLOURS, (0.26, 0.22, 0.18, 0.14, 0.11, 0.09), strict=True))
SHAPE_SHARE = dict(zip(SHAPES, (0.36, 0.30, 0.20, 0.14), strict=True))
#: Colour-shape pairs that are seldom drawn, and those that no training clip shows.
RARE = frozenset({("red", "cross"), ("blue", "circle"), ("green", "triangle"), ("yellow", "square")})
HELD_OUT = frozenset({("cyan", "square"), ("yellow", "triangle"), ("blue", "cross"), ("white", "circle")})
_RARE_SHARE = 0.15  # of the chance a pair would have
MARGIN = 1.0  # pixels kept free at the border and between objects that do not touch


@dataclass(frozen=True)
class Body:
    """One object of a clip: what it is, and where in every frame."""

    colour: str
    shape: str
    radius: float  # pixels
    centres: np.ndarray  # [F, 2] as (x, y), pixels

    @property
    def nearness(self) -> float:
        """Inverse distance, 1 for the nearest that there is."""
        return self.radius / SIZES[None][1]


@dataclass(frozen=True)
class Motion:
    """How something moves."""

    direction: str | None = None  #: `None`: it stands
    speed: str | None = None  #: "slowly" or "quickly"; `None` if it stands


def pairs(held_out: bool) -> list[tuple[str, str]]:
    """The colour-shape pairs of training (`held_out=False`) or those that training never shows."""
    return [p for p in itertools.product(COLOURS, SHAPES) if (p in HELD_OUT) == held_out]


def pair_shares(held_out: bool | None = False) -> dict[tuple[str, str], float]:
    """How often each colour-shape pair is drawn; sums to 1.

    Args:
        held_out: `False` gives the pairs of training, `True` those that training never shows, `None` all of them.
    """
    share = {
        (colour, shape): of_colour * of_shape * (_RARE_SHARE if (colour, shape) in RARE else 1)
        for (colour, of_colour), (shape, of_shape) in itertools.product(COLOUR_SHARE.items(), SHAPE_SHARE.items())
        if held_out is None or ((colour, shape) in HELD_OUT) == held_out
    }
    total = sum(share.values())
    return {pair: value / total for pair, value in share.items()}


def random_path(rng: np.random.Generator, radius: float, motion: Motion, frames: int = FRAMES) -> np.ndarray:
    """Centres `[F, 2]` of an object that stands, or moves straight at constant speed, and stays inside the frame.

    Clips of another length move from the same first to the same last place.
    """
    if motion.direction is None:
        way = np.zeros(2)
    else:
        way = rng.uniform(*TRAVEL[motion.speed]) * np.array(DIRECTIONS[motion.direction], float)
    room = radius + MARGIN + np.abs(way) / 2
    middle = rng.uniform(room, SIZE - 1 - room)
    return middle + np.linspace(-0.5, 0.5, frames)[:, None] * way


def gap(first: Body, second: Body) -> float:
    """Pixels between the bounding squares of two objects where they are nearest in time; negative if they overlap."""
    apart = np.abs(first.centres - second.centres).max(axis=1)
    return float(apart.min() - first.radius - second.radius)


def stands(first: Body, second: Body, relation: str) -> bool:
    """Whether the first object is where the relation to the second says, in every frame.

    Beside: farther to that side than in the other direction, and clear of the other. Behind: nearer objects hide
    between a tenth and half of its bounding square.
    """
    way = second.centres - first.centres
    if relation == "behind":
        if first.radius >= second.radius - 0.5:
            return False
        overlap = np.clip(first.radius + second.radius - np.abs(way), 0, 2 * first.radius)
        hidden = overlap.prod(axis=1) / (2 * first.radius) ** 2
        return bool(((hidden > 0.1) & (hidden < 0.5)).all())
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    along, across = sign * way[:, axis], np.abs(way[:, 1 - axis])
    return bool((along > 1.5 * across).all()) and gap(first, second) > MARGIN


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


def _covers(bodies: Sequence[Body], size: int) -> Iterator[tuple[Body, torch.Tensor]]:
    """The objects of a clip, the farthest first, each with what it covers of every pixel, `[F, 1, H, W]` in [0, 1]."""
    axis = torch.arange(size, dtype=torch.float32) * (SIZE / size)
    for body in sorted(bodies, key=lambda body: body.nearness):
        centres = torch.as_tensor(body.centres, dtype=torch.float32)
        x = axis - centres[:, 0, None, None]  # [F, 1, W]
        y = axis[:, None] - centres[:, 1, None, None]  # [F, H, 1]
        x, y = torch.broadcast_tensors(x, y)
        distance = signed_distance(body.shape, x, y, torch.tensor(body.radius))
        yield body, (0.5 - distance).clamp(0, 1)[:, None]


def render(clips: Sequence[Sequence[Body]], size: int = SIZE) -> torch.Tensor:
    """Draws clips of at least one object each as float32 `[B, F, 3, size, size]` in [0, 1]."""
    frames = len(clips[0][0].centres)
    video = torch.full((len(clips), frames, 3, size, size), BACKGROUND)
    for clip, bodies in zip(video, clips, strict=True):
        for body, cover in _covers(bodies, size):
            colour = torch.tensor(COLOURS[body.colour])[:, None, None]
            clip.mul_(1 - cover).add_(cover * colour)
    return video


def render_depth(clips: Sequence[Sequence[Body]], size: int = SIZE) -> torch.Tensor:
    """Draws how near things are, float32 `[B, F, size, size]`: inverse distance, 1 the nearest and 0 the ground."""
    frames = len(clips[0][0].centres)
    depth = torch.zeros(len(clips), frames, size, size)
    for clip, bodies in zip(depth, clips, strict=True):
        for body, cover in _covers(bodies, size):
            clip.mul_(1 - cover[:, 0]).add_(cover[:, 0] * body.nearness)
    return depth


def render_masks(bodies: Sequence[Body], size: int = SIZE) -> torch.Tensor:
    """Draws what is seen of each object of a clip, float32 `[N, F, size, size]` in [0, 1], in the order given."""
    masks = {}
    for body, cover in _covers(bodies, size):
        for farther in masks.values():
            farther.mul_(1 - cover[:, 0])
        masks[id(body)] = cover[:, 0].clone()
    return torch.stack([masks[id(body)] for body in bodies])
