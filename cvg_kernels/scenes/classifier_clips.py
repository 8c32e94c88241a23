"""What this world's classifiers learn from: clips that the UNet makes, and what the oracle sees in them.

Two classifiers, each of one question about every thing named: how many of it are shown (none, if it is dropped), and
how it stands to the other. What the model makes of a prompt is up to the noise, and the maps of the first steps tell
a part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cvg_kernels.composition.features import Selection
from cvg_kernels.errors import ArgumentError
from cvg_kernels.scenes.captions import Caption, random_things
from cvg_kernels.scenes.oracle import Seen, look
from cvg_kernels.scenes.verdict import relation_holds
from cvg_kernels.scenes.world import FRAMES, RELATIONS, SIZE
from cvg_kernels.shapes.pipeline import GUIDANCE_SCALE, STEPS
from cvg_kernels.training.features import BATCH, examples_of, record_entities
from cvg_kernels.training.store import GENERATED, Examples

#: What is true of a thing, by question. Nobody asks for the last of either: it is what guidance leads away from.
LABELS = {"number": ("one", "two", "three", "four", "none"), "relation": (*RELATIONS, "neither")}
_ENTITIES = 4  # the most that a prompt names
_GRID = 16


@dataclass(frozen=True)
class Clips:
    """Which clips are made.

    Attributes:
        question: one of `LABELS`. `number`: prompts of two to four things, one in four of several alike. `relation`:
            prompts of how two things stand.
        generated: how many.
        read_steps: how many of the first denoising steps are read.
        steps: number of steps of the sampler.
        seed: random seed of everything.
    """

    question: str = "number"
    generated: int = 1200
    read_steps: int = 4
    steps: int = STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.question not in LABELS:
            raise ArgumentError(f"question must be one of {', '.join(LABELS)}, got {self.question!r}")

    @property
    def labels(self) -> tuple[str, ...]:
        """What can be true of a thing."""
        return LABELS[self.question]

    @property
    def ends(self) -> tuple[int]:
        """The clips are of one kind: how many."""
        return (self.generated,)

    def grid(self, pipe: Any) -> tuple[int, int, int]:
        """Frames, rows and columns of the features."""
        return FRAMES, _GRID, _GRID

    def make(self, pipe: Any, selection: Selection, numbers: range) -> Examples:
        """Makes the examples of some clips; each depends on the seed and its number alone."""
        return _generated(pipe, self, selection, numbers)


def _generated(pipe: Any, clips: Clips, selection: Selection, numbers: range) -> Examples:
    """Clips that the pipeline makes; what is true of them is what the oracle sees, whatever the prompt said."""
    count = 2 + numbers[0] // BATCH % 3  # all prompts of a batch name as many things
    prompts = [_prompt(np.random.default_rng((clips.seed, 8, number)), clips.question, count) for number in numbers]
    maps, frames = record_entities(
        pipe,
        list(map(str, prompts)),
        clips.labels,
        selection,
        steps=clips.read_steps,
        video=True,
        num_frames=FRAMES,
        height=SIZE,
        width=SIZE,
        num_inference_steps=clips.steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=[torch.Generator().manual_seed(clips.seed * 1_000_003 + number) for number in numbers],
    )
    assert frames is not None  # they were asked for
    number_of = clips.labels.index
    true = [
        list(map(number_of, label_clip(clips.question, look(clip), prompt)))
        for clip, prompt in zip(frames, prompts, strict=True)
    ]
    asked = [list(map(number_of, labels_asked(clips.question, prompt))) for prompt in prompts]
    return examples_of(maps, true, asked, entities=_ENTITIES, source=GENERATED, numbers=numbers)


def _prompt(rng: np.random.Generator, question: str, count: int) -> Caption:
    things = random_things(rng, 2 if question == "relation" else count)
    if question == "relation":
        return Caption(things, str(rng.choice(RELATIONS)))
    if rng.random() < 0.25:  # several alike, beside one other at most
        number = 2 + int(rng.choice(3, p=(0.5, 0.35, 0.15)))
        things = tuple(
            dataclasses.replace(thing, count=number) if at == 0 else thing for at, thing in enumerate(things)
        )
    return Caption(things)


def label_clip(question: str, seen: Sequence[Seen], prompt: Caption) -> list[str]:
    """What is true of the things that a prompt names, by what the oracle saw.

    Args:
        question: one of `LABELS`.
        seen: objects of the clip.
        prompt: what was asked for; two things for a relation.

    Returns:
        A label for each thing; for a relation, of the first alone.
    """
    found = [
        [one for one in seen if (one.colour, one.shape) == (thing.colour, thing.shape)] for thing in prompt.things
    ]
    if question == "number":
        return [LABELS["number"][min(len(one), 4) - 1] for one in found]  # the last for none
    first, second = found
    order = (str(prompt.relation), "behind", *RELATIONS)
    holds = [word for word in order if first and second and relation_holds(first[0], second[0], word)]
    return [holds[0] if holds else "neither"]


def labels_asked(question: str, prompt: Caption) -> list[str]:
    """What a prompt says of the same things."""
    if question == "number":
        return [LABELS["number"][thing.count - 1] for thing in prompt.things]
    return [str(prompt.relation)]
