"""The oracle: reads colour, shape, place and direction out of the frames of a clip.

It knows the world's palette and outlines and nothing else. Every pixel goes to the nearest palette colour or the
ground; a colour's pixels in a frame are an object if they form one compact blob of a plausible size, which noise does
not. The shape is the outline that overlaps the blob best, the direction the slope of its centre over the frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cvg_kernels.shapes.world import BACKGROUND, COLOURS, DIRECTIONS, SHAPES, Thing, signed_distance

_FAR = 0.45  # pixels farther than this from every palette colour belong to nothing
_MIN_AREA, _MAX_AREA = 40, 420  # pixels of an object at 64×64
_MIN_CONCENTRATION = 0.75  # share of a colour's pixels that lie in its blob
_MIN_FILL = 0.40  # share of the blob's bounding box that it fills; a cross fills half
_MIN_OVERLAP = 0.55  # intersection over union with the best outline
_MIN_TRAVEL = 6.0  # pixels from first to last frame
_MIN_FRAMES = 0.5  # share of the frames in which an object must be seen


@dataclass(frozen=True)
class Seen:
    """An object that the oracle found.

    Attributes:
        colour: one of the world's.
        shape: `None`: no outline fits.
        direction: `None`: it does not move clearly.
        centres: `[F, 2]` as (x, y), NaN where it is not seen.
    """

    colour: str
    shape: str | None
    direction: str | None
    centres: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """What of a caption is true of a clip.

    Attributes:
        present: every thing is there: its colour, or failing that its shape, is among the objects, one object a thing.
        bound: every thing's shape is seen in its colour.
        direction: every thing's colour moves as asked.
        all_right: present, bound and direction.
    """

    present: bool
    bound: bool
    direction: bool
    all_right: bool


def classify_pixels(frames: torch.Tensor) -> np.ndarray:
    """Index of the nearest palette colour of each pixel, −1 for the ground or nothing, `[F, H, W]`.

    Args:
        frames: `[F, 3, H, W]` in [0, 1].
    """
    palette = torch.tensor([(BACKGROUND,) * 3, *COLOURS.values()])
    distance = torch.cdist(frames.float().permute(0, 2, 3, 1).reshape(-1, 3), palette)
    nearest = distance.argmin(1)
    nearest[distance.gather(1, nearest[:, None])[:, 0] > _FAR] = 0
    return (nearest - 1).view(len(frames), *frames.shape[2:]).numpy()


def _largest_blob(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected region of a mask."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest label around it until nothing changes
        grown = labels.copy()
        grown[1:] = np.maximum(grown[1:], labels[:-1])
        grown[:-1] = np.maximum(grown[:-1], labels[1:])
        grown[:, 1:] = np.maximum(grown[:, 1:], labels[:, :-1])
        grown[:, :-1] = np.maximum(grown[:, :-1], labels[:, 1:])
        grown[~mask] = 0
        if np.array_equal(grown, labels):
            break
        labels = grown
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax() if sizes.any() else np.zeros_like(mask)


def _blob(mask: np.ndarray) -> np.ndarray | None:
    """The object in a colour's pixels of one frame, if they look like one."""
    count = mask.sum()
    if count < _MIN_AREA:
        return None
    blob = _largest_blob(mask)
    area = blob.sum()
    rows, columns = np.flatnonzero(blob.any(1)), np.flatnonzero(blob.any(0))
    box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    compact = area >= _MIN_CONCENTRATION * count and area >= _MIN_FILL * box
    return blob if compact and _MIN_AREA <= area <= _MAX_AREA else None


def _shape_of(blob: np.ndarray) -> str | None:
    """The outline that overlaps a blob best, over sizes and small shifts; `None` if none does well."""
    rows, columns = np.nonzero(blob)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    y = torch.arange(blob.shape[0], dtype=torch.float32)[:, None] - (rows.min() + rows.max()) / 2
    x = torch.arange(blob.shape[1], dtype=torch.float32)[None] - (columns.min() + columns.max()) / 2
    target = torch.from_numpy(blob)
    best, found = _MIN_OVERLAP, None
    for shape in SHAPES:
        for radius in np.linspace(0.42, 0.6, 7) * max(height, width):
            # A triangle's box is not centred on it: it reaches from −r to 0.9 r.
            for shift in (-0.05 * radius, 0.0, 0.05 * radius) if shape == "triangle" else (0.0,):
                filled = signed_distance(shape, x, y + shift, torch.tensor(float(radius))) < 0
                overlap = (filled & target).sum() / (filled | target).sum().clamp_min(1)
                if overlap > best:
                    best, found = float(overlap), shape
    return found


def _direction_of(centres: np.ndarray) -> str | None:
    """The main axis of a straight motion; `None` if it is short or crooked."""
    seen = np.flatnonzero(~np.isnan(centres[:, 0]))
    if len(seen) < 3:
        return None
    travel = np.polyfit(seen, centres[seen], 1)[0] * (len(centres) - 1)  # pixels over the clip, (x, y)
    along = int(np.abs(travel).argmax())
    if abs(travel[along]) < _MIN_TRAVEL or abs(travel[along]) < 2 * abs(travel[1 - along]):
        return None
    step = [0, 0]
    step[along] = int(np.sign(travel[along]))
    return next(name for name, vector in DIRECTIONS.items() if vector == tuple(step))


def look(frames: torch.Tensor) -> list[Seen]:
    """Finds the objects of a clip.

    Args:
        frames: `[F, 3, 64, 64]` in [0, 1].

    Examples:
        >>> import numpy
        >>> things = cvg.shapes.parse_caption("a red circle moving left")
        >>> scene = cvg.shapes.random_scene(numpy.random.default_rng(1), things)
        >>> [(seen.colour, seen.shape, seen.direction) for seen in cvg.shapes.look(cvg.shapes.render([scene])[0])]
        [('red', 'circle', 'left')]
    """
    colours = classify_pixels(frames)
    found = []
    for index, colour in enumerate(COLOURS):
        blobs = [_blob(frame == index) for frame in colours]
        visible = [blob for blob in blobs if blob is not None]
        if len(visible) < _MIN_FRAMES * len(blobs):
            continue
        centres = np.full((len(blobs), 2), np.nan)
        for number, blob in enumerate(blobs):
            if blob is not None:
                rows, columns = np.nonzero(blob)
                centres[number] = columns.mean(), rows.mean()
        votes = Counter(_shape_of(blob) for blob in visible)
        shape, count = votes.most_common(1)[0]
        found.append(Seen(colour, shape if 2 * count > len(visible) else None, _direction_of(centres), centres))
    return found


def frame_consistency(frames: torch.Tensor) -> float:
    """How alike neighbouring frames are, wherever things have moved to: 1 if no colour grows, shrinks or flickers.

    Mean over neighbouring frames of Σ_c min(n_c, n'_c) / Σ_c max(n_c, n'_c), n_c the pixels of palette colour c; a
    pair without any coloured pixel counts 0.

    Args:
        frames: `[F, 3, 64, 64]` in [0, 1].
    """
    colours = classify_pixels(frames)
    counts = np.stack([(colours == index).sum((1, 2)) for index in range(len(COLOURS))], 1)
    before, after = counts[:-1], counts[1:]
    most = np.maximum(before, after).sum(1)
    return float((np.minimum(before, after).sum(1) / np.maximum(most, 1)).mean())


def judge(frames: torch.Tensor, things: Sequence[Thing]) -> Verdict:
    """Compares a clip with what it should show.

    Args:
        frames: `[F, 3, 64, 64]` in [0, 1].
        things: the things of its caption, of different colours.

    Examples:
        >>> import numpy
        >>> scene = cvg.shapes.random_scene(numpy.random.default_rng(1))
        >>> cvg.shapes.judge(cvg.shapes.render([scene])[0], scene.things)
        Verdict(present=True, bound=True, direction=True, all_right=True)
    """
    return compare(look(frames), things)


def compare(seen: Sequence[Seen], things: Sequence[Thing]) -> Verdict:
    """Compares what `look` found with the things of a caption, of different colours."""
    by_colour = {one.colour: one for one in seen}
    shapes = Counter(one.shape for one in seen if one.colour not in {t.colour for t in things})
    missing = [thing for thing in things if thing.colour not in by_colour]
    # A thing in a wrong colour is still there, if an object of no other thing has its shape.
    present = all(shapes[thing.shape] > 0 and not shapes.subtract([thing.shape]) for thing in missing)
    asked = [by_colour.get(thing.colour) for thing in things]
    bound = all(one is not None and one.shape == thing.shape for one, thing in zip(asked, things, strict=True))
    direction = all(
        one is not None and one.direction == thing.direction for one, thing in zip(asked, things, strict=True)
    )
    return Verdict(present, bound, direction, present and bound and direction)
