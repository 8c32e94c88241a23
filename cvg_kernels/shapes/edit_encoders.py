"""How well the editor's own encoders read the shapes world: content, by retrieval, and depth, by its error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cvg_kernels.editing.content import embed_images, embed_texts, predict_image_embedding
from cvg_kernels.editing.depth import estimate_depth
from cvg_kernels.intervals import mean, rate
from cvg_kernels.shapes.latents import tokenize
from cvg_kernels.shapes.train_depth import depth_frames
from cvg_kernels.shapes.world import COLOURS, DIRECTIONS, HELD_OUT, SHAPES, Thing, caption, random_scene, render


def contents(things: int, held_out: bool) -> list[tuple[Thing, ...]]:
    """All that a frame can show: things of different colours, in no order.

    Args:
        things: in a frame.
        held_out: whether pairs of colour and shape that no training clip shows are among them.
    """
    known = [Thing(*pair, None) for pair in itertools.product(COLOURS, SHAPES) if held_out or pair not in HELD_OUT]
    return [each for each in itertools.combinations(known, things) if len({thing.colour for thing in each}) == things]


@torch.no_grad()
def retrieval(pipe: Any, things: int, held_out: bool, frames: int, seed: int) -> dict[str, Any]:
    """How often, of all captions there are, the nearest to a frame is its own: by its embedding, and by the prior's.

    Args:
        pipe: the editor.
        things: in a frame.
        held_out: asks only for frames with pairs that no training clip shows, among the captions of all.
        frames: how many are asked for.
        seed: random seed of the frames.

    Returns:
        `captions`, how many there are, and the rates of `text` (the caption's embedding is nearest) and `prior` (what
        the prior makes of it is).
    """
    every = contents(things, held_out)
    asked = [each for each in every if not held_out or any(map(_is_new, each))]
    texts = embed_texts(pipe.content_encoder, tokenize(pipe.tokenizer, [caption(e) for e in every]))
    predicted = predict_image_embedding(pipe.prior, texts, pipe.prior_scheduler)
    rng = np.random.default_rng((seed, 7))
    shown = [asked[number] for number in rng.integers(len(asked), size=frames)]
    images = torch.cat([embed_images(pipe.content_encoder, _frame(rng, each)) for each in shown])
    right = torch.tensor([every.index(each) for each in shown])
    hits = {
        name: ((images @ table.T).argmax(1) == right).tolist()
        for name, table in (("text", texts), ("prior", predicted))
    }
    return {"captions": len(every)} | {name: rate(values) for name, values in hits.items()}


def _is_new(thing: Thing) -> bool:
    return (thing.colour, thing.shape) in HELD_OUT


def _frame(rng: np.random.Generator, content: Sequence[Thing]) -> torch.Tensor:
    moving = [Thing(t.colour, t.shape, str(rng.choice(list(DIRECTIONS)))) for t in content]
    return render([random_scene(rng, moving, frames=1, speed=(0.0, 6.0))])[:, 0]


@torch.no_grad()
def depth_error(pipe: Any, frames: int, seed: int) -> dict[str, Any]:
    """The mean of |depth − true depth| over all pixels and over those of things; the nearest is 1, the ground 0.

    Args:
        pipe: the editor.
        frames: how many.
        seed: random seed of the frames.
    """
    shown, true = depth_frames(np.random.default_rng((seed, 8)), frames)
    error = (estimate_depth(pipe.depth_estimator, shown) - true).abs()
    inside = true > 0.5  # the edge of a thing is no nearer than half
    return {
        "pixels": mean(error.mean((1, 2)).tolist()),
        "things": mean([float(e[i].mean()) for e, i in zip(error, inside, strict=True) if i.any()]),
    }


def measure_encoders(pipe: Any, *, seed: int, frames: int = 400) -> dict[str, Any]:
    """Retrieval and the error of depth, on fresh frames.

    Args:
        pipe: the editor.
        seed: random seed of the frames.
        frames: number of frames of each measurement.
    """
    cases = {
        "one thing": (1, False),
        "two things": (2, False),
        "one thing, pairs never seen": (1, True),
        "two things, pairs never seen": (2, True),
    }
    found = {name: retrieval(pipe, *case, frames, seed) for name, case in cases.items()}
    return {"retrieval": found, "depth_error": depth_error(pipe, frames, seed)}
