"""Image quality of clips of the shapes world: how cleanly objects are drawn, and how like real clips a set of clips
is.

The oracle's verdict says what a clip shows, not how well: a guidance that tears objects apart can still get them
right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cvg_kernels.intervals import Z95
from cvg_kernels.shapes.oracle import Seen
from cvg_kernels.shapes.world import (
    BACKGROUND,
    COLOURS,
    FRAMES,
    SHAPES,
    SIZE,
    Thing,
    random_scene,
    render,
    signed_distance,
)

_RADII = torch.arange(5.0, 11.01, 0.25)  # pixels; objects of the world have 6.5 to 9
_BORDER = 2.0  # pixels around an object that belong to its box
#: A triangle reaches from −r to 0.9 r; its centroid lies two thirds of that from the apex.
_CENTROID = {"triangle": 1.9 * 2 / 3 - 1}
_BOOTSTRAPS = 200


def object_distance(frames: torch.Tensor, seen: Sequence[Seen]) -> float | None:
    """How far the objects that the oracle found are from clean renderings of themselves.

    Every frame is drawn anew: each object in the palette's colour, its shape, centre (see `Seen`), and the radius that
    fits best. The distance of an object is the mean of |frame − drawing| over the channels and the pixels of the box
    of half side radius + 2 around it; that of a clip is the mean over its objects and the frames that show them.

    A shape that the oracle could not name is drawn as the outline that fits best. Objects that are missing count
    nothing, they are the business of `present`.

    Args:
        frames: `[F, 3, 64, 64]` in [0, 1].
        seen: what `oracle.look` found in them.

    Returns:
        0 for what the world renders, up to the accuracy of the centres (0.01); `None` if nothing was found.
    """
    distances = []
    for number, frame in enumerate(frames):
        visible = [one for one in seen if not np.isnan(one.centres[number, 0])]
        if not visible:
            continue
        fits = [_fit(frame, one, number) for one in visible]
        drawing = torch.full_like(frame, BACKGROUND)
        for one, (cover, _) in zip(visible, fits, strict=True):
            drawing = drawing + cover * (_colour(one) - drawing)
        error = (frame - drawing).abs().mean(0)  # [H, W]
        distances += [float(error[box].mean()) for _, box in fits]
    return float(np.mean(distances)) if distances else None


def _colour(one: Seen) -> torch.Tensor:
    """`[3, 1, 1]`."""
    return torch.tensor(COLOURS[one.colour])[:, None, None]


def _fit(frame: torch.Tensor, one: Seen, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cover and box `[H, W]` of the rendering of an object, of all radii, that is closest to a frame around it."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    x, y = torch.meshgrid(axis, axis, indexing="xy")  # [H, W]
    x, y = (index - float(centre) for index, centre in zip((x, y), one.centres[number], strict=True))
    distance = torch.maximum(x.abs(), y.abs())  # box distance to the centroid
    near = distance <= _RADII[-1] + _BORDER  # the same pixels for every radius
    ground = torch.tensor(BACKGROUND)
    best, fit = float("inf"), None
    for shape in SHAPES if one.shape is None else (one.shape,):
        radii = _RADII[:, None, None]
        below = _CENTROID.get(shape, 0.0) * radii  # of the shape's centre
        cover = (0.5 - signed_distance(shape, x, y + below, radii)).clamp(0, 1)  # [R, H, W]
        drawing = ground + cover[:, None] * (_colour(one) - ground)  # [R, 3, H, W]
        errors = (frame - drawing).abs().mean(1)[:, near].mean(1)  # [R]
        index = int(errors.argmin())
        if errors[index] < best:
            best, fit = errors[index], (cover[index], distance <= _RADII[index] + _BORDER)
    return fit


@torch.no_grad()
def encoder_features(vae: Any, clips: torch.Tensor) -> torch.Tensor:
    """What our own trained autoencoder's encoder says of each clip, pooled: float64 `[B, 6 · C]`.

    Per frame and channel of the latents: mean and standard deviation over space, and the standard deviation over space
    of the difference to the next frame; of each of these, mean and standard deviation over the frames.

    Args:
        vae: the pipeline's, of C latent channels.
        clips: `[B, F, 3, H, W]` in [0, 1].
    """
    place = next(vae.parameters())
    features = []
    for clip in clips:
        z = vae.encode((clip * 2 - 1).to(place.device, place.dtype)).latent_dist.mean
        z = (z * vae.config.scaling_factor).double().cpu().flatten(2)  # [F, C, h · w]
        series = (z.mean(2), z.std(2), z.diff(dim=0).std(2))  # [F or F − 1, C] each
        features.append(torch.cat([pool for s in series for pool in (s.mean(0), s.std(0))]))
    return torch.stack(features)


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features `[N, D]`.

    |m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½), "The Fréchet distance between multivariate normal distributions" (1982).
    """
    difference = one.mean(0) - other.mean(0)
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(a) + np.trace(b) - 2 * cross)


def encoder_frechet(clips: torch.Tensor, real: torch.Tensor) -> dict[str, Any]:
    """Fréchet distance of our encoder's features between a set of clips and real clips of the same prompts.

    Not FVD: the encoder is the shapes pipeline's own and knows nothing else. Estimates from few clips are too large by
    an amount that depends on their number; compare sets of the same size, and with `value` of another real set.

    Args:
        clips: features `[N, D]`, see `encoder_features`.
        real: features of as many real clips, prompt by prompt.

    Returns:
        `value`, and `ci95`: ± 1.96 standard deviations of the distance over 200 draws of N prompts with replacement.
    """
    one, other = clips.numpy(), real.numpy()
    value = frechet(one, other)
    rng = np.random.default_rng(0)
    draws = rng.integers(len(one), size=(_BOOTSTRAPS, len(one)))
    half = Z95 * float(np.std([frechet(one[draw], other[draw]) for draw in draws], ddof=1))
    return {"value": value, "ci95": [max(0.0, value - half), value + half]}


def real_clips(things: Sequence[Sequence[Thing]], seed: int, draw: int = 0, frames: int = FRAMES) -> torch.Tensor:
    """Clips `[B, F, 3, 64, 64]` that the world renders for prompts.

    Args:
        things: things of each prompt.
        seed: random seed of places, sizes and speeds.
        draw: another number gives another set.
        frames: length of the clips.
    """
    rng = np.random.default_rng((seed, 6, draw))
    return render([random_scene(rng, each, frames) for each in things])


@torch.no_grad()
def reconstruct(vae: Any, clips: torch.Tensor) -> torch.Tensor:
    """Clips `[B, F, 3, H, W]` in [0, 1] through the autoencoder: what a perfect denoiser would make."""
    place = next(vae.parameters())
    decoded = [
        vae.decode(vae.encode((clip * 2 - 1).to(place.device, place.dtype)).latent_dist.mean).sample for clip in clips
    ]
    return (torch.stack(decoded).float().cpu() / 2 + 0.5).clamp(0, 1)
