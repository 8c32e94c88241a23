"""The oracle: reads out of the frames of a clip what is there, where, and how it moves.

It knows the world's palette and outlines and nothing else. Every pixel goes to the nearest colour of the palette, the
ground, or nothing; what hangs together in one colour is a blob. A blob is an object if an outline of the world covers
it well, where pixels of other objects, which may be in front, do not count. Blobs of one colour that follow each other
over the frames are one object.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional

from cvg_kernels.scenes.world import BACKGROUND, COLOURS, DIRECTIONS, FRAMES, SHAPES, SIZE, signed_distance

_FAR = 0.45  # pixels farther than this from every colour belong to nothing
_AREA = (22, 330)  # pixels of an object: half of the smallest hidden, and a little more than the largest
_MIN_FILL = 0.3  # share of its bounding box that a blob fills; a cross fills half, a rim of mixed colour an eighth
_MIN_OVERLAP = 0.6  # intersection over union with the best outline
_REACH = 9.0  # pixels that an object can move between two sightings; the quickest moves 4.3 a frame
_MIN_SEEN = 0.5  # share of the frames in which an object must be seen
_MIN_TRAVEL = 4.5  # pixels from the first to the last frame of what moves
_QUICK = 16.5  # pixels of travel that part "slowly" from "quickly"
#: Width of each outline's bounding box, and how far its middle lies below the centre, in radii.
_BOX = {"circle": (2.0, 0.0), "square": (1.8, 0.0), "triangle": (1.9, -0.05), "cross": (2.0, 0.0)}


@dataclass(frozen=True)
class Blob:
    """One object in one frame."""

    frame: int
    shape: str | None  #: `None`: no outline fits
    radius: float
    centre: tuple[float, float]  #: (x, y)


@dataclass
class Seen:
    """An object that the oracle found in a clip."""

    colour: str
    blobs: list[Blob] = field(default_factory=list)
    frames: int = FRAMES  #: of the clip

    @property
    def shape(self) -> str | None:
        """The outline that fits in most frames."""
        return Counter(blob.shape for blob in self.blobs).most_common(1)[0][0]

    @property
    def radius(self) -> float:
        """Median over the frames, in pixels."""
        return float(np.median([blob.radius for blob in self.blobs]))

    @property
    def centres(self) -> np.ndarray:
        """`[F, 2]` as (x, y), NaN where it is not seen."""
        centres = np.full((self.frames, 2), np.nan)
        for blob in self.blobs:
            centres[blob.frame] = blob.centre
        return centres

    @property
    def travel(self) -> np.ndarray:
        """Way from the first to the last frame, (x, y), by a straight line through the centres."""
        if len(self.blobs) < 2:
            return np.zeros(2)
        frames = np.array([blob.frame for blob in self.blobs])
        centres = np.array([blob.centre for blob in self.blobs])
        return np.polyfit(frames, centres, 1)[0] * (self.frames - 1)

    @property
    def direction(self) -> str | None:
        """Where it moves; `None` if it stands, or moves askew."""
        way = self.travel
        axis = int(np.abs(way).argmax())
        if abs(way[axis]) < _MIN_TRAVEL or abs(way[axis]) < 2 * abs(way[1 - axis]):
            return None
        return next(name for name, step in DIRECTIONS.items() if step[axis] == int(np.sign(way[axis])))

    @property
    def speed(self) -> str | None:
        """How it moves; `None` if it does not."""
        if self.direction is None:
            return None
        return "quickly" if np.abs(self.travel).max() > _QUICK else "slowly"


def nearest_colours(frames: torch.Tensor) -> torch.Tensor:
    """The number of the nearest colour of every pixel, from 0 in the order of `COLOURS`; -1 for the ground or nothing.

    Args:
        frames: `[F, 3, H, W]` in [0, 1].
    """
    palette = torch.tensor([*COLOURS.values(), (BACKGROUND,) * 3])
    distance = (frames[:, None] - palette[None, :, :, None, None]).square().sum(2).sqrt()
    nearest = distance.min(1)
    number = nearest.indices
    return torch.where((nearest.values < _FAR) & (number < len(COLOURS)), number, -1)


def connected(mask: torch.Tensor) -> torch.Tensor:
    """Numbers the connected parts of masks: `[..., H, W]` bool → int64, 0 outside; corners connect.

    Every pixel takes the largest number around it until nothing changes.
    """
    height, width = mask.shape[-2:]
    flat = mask.reshape(-1, 1, height, width)
    labels = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, 1, height, width)
    labels = labels * flat
    while True:
        spread = functional.max_pool2d(labels, 3, 1, 1) * flat
        if torch.equal(spread, labels):
            return labels.long().view(mask.shape)
        labels = spread


def look(clip: torch.Tensor) -> list[Seen]:
    """Finds the objects of a clip.

    Args:
        clip: `[F, 3, 64, 64]` in [0, 1].

    Returns:
        What is seen in at least half of the frames, in no order that means anything.
    """
    clip = clip.detach().float().cpu()
    if clip.ndim != 4 or clip.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"clip must be [F, 3, {SIZE}, {SIZE}], got {list(clip.shape)}")
    numbers = nearest_colours(clip)
    found: list[Seen] = []
    for number, colour in enumerate(COLOURS):
        mask = numbers == number
        if int(mask.sum()) < _AREA[0]:
            continue
        labels = connected(mask)
        tracks: list[Seen] = []
        for frame in range(len(clip)):
            blobs = _blobs(labels[frame], numbers[frame], number, frame)
            _continue(tracks, blobs, colour, len(clip))
        found += [track for track in tracks if len(track.blobs) >= _MIN_SEEN * len(clip)]
    return found


def _continue(tracks: list[Seen], blobs: list[Blob], colour: str, frames: int) -> None:
    """Gives each blob of a frame to the nearest object of its colour that has none yet, or makes a new one."""
    ways = sorted(
        (float(np.hypot(*np.subtract(blob.centre, track.blobs[-1].centre))), i, j)
        for i, blob in enumerate(blobs)
        for j, track in enumerate(tracks)
    )
    taken: dict[int, int] = {}
    for way, i, j in ways:
        gap = blobs[i].frame - tracks[j].blobs[-1].frame
        if i not in taken and j not in taken.values() and way <= _REACH * gap:
            taken[i] = j
    for i, blob in enumerate(blobs):
        if i in taken:
            tracks[taken[i]].blobs.append(blob)
        else:
            tracks.append(Seen(colour, [blob], frames))


def _blobs(labels: torch.Tensor, numbers: torch.Tensor, number: int, frame: int) -> list[Blob]:
    """The objects of one colour in one frame."""
    found = []
    others = (numbers >= 0) & (numbers != number)
    for label, area in zip(*labels.unique(return_counts=True), strict=True):
        if label == 0 or not _AREA[0] <= area <= _AREA[1]:
            continue
        mask = labels == label
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        top, bottom = int(rows[0]), int(rows[-1])
        left, right = int(columns[0]), int(columns[-1])
        if area < _MIN_FILL * (bottom - top + 1) * (right - left + 1):
            continue
        shape, radius, centre = _outline(mask, others, (left, top, right, bottom))
        found.append(Blob(frame, shape, radius, centre))
    return found


def _outline(mask: torch.Tensor, others: torch.Tensor, box: tuple[int, int, int, int]):
    """The shape, radius and centre of the outline that covers a blob best; shape `None` if none does.

    The blob's larger side gives the radius. Along the other it may be hidden at one end, so the outline is tried
    against both ends and in the middle.
    """
    left, top, right, bottom = box
    width, height = right - left + 1, bottom - top + 1
    pad = 6  # the outline may reach behind what hides it
    y0, x0 = max(0, top - pad), max(0, left - pad)
    part = (slice(y0, bottom + pad + 1), slice(x0, right + pad + 1))
    mask, seen = mask[part], ~others[part]
    hidden = bool((functional.max_pool2d(mask[None].float(), 3, 1, 1)[0].bool() & ~seen).any())
    y = torch.arange(y0, y0 + mask.shape[0], dtype=torch.float32)[:, None]
    x = torch.arange(x0, x0 + mask.shape[1], dtype=torch.float32)[None]
    best = (0.0, None, max(width, height) / 2, ((left + right) / 2, (top + bottom) / 2))
    for shape in SHAPES:
        factor, below = _BOX[shape]
        for extra in (0.0, 0.35, -0.35):
            radius = max(width, height) / factor + extra
            half = radius * factor / 2
            ends = {
                "x": {(left + right) / 2, left - 0.5 + half, right + 0.5 - half},
                "y": {(top + bottom) / 2, top - 0.5 + half, bottom + 0.5 - half},
            }
            if not hidden:
                ends = {"x": {(left + right) / 2}, "y": {(top + bottom) / 2}}
            for middle_x in ends["x"]:
                for middle_y in ends["y"]:
                    centre = (middle_x, middle_y - below * radius)
                    inside = (signed_distance(shape, x - centre[0], y - centre[1], torch.tensor(radius)) < 0) & seen
                    overlap = float((inside & mask).sum() / (inside | mask).sum())
                    if overlap > best[0]:
                        best = (overlap, shape, radius, centre)
    overlap, shape, radius, centre = best
    return (shape if overlap >= _MIN_OVERLAP else None), radius, centre
