"""What the shapes world's classifier learns from: real clips inverted, and generated ones as the oracle reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cvg_kernels.composition.features import Selection
from cvg_kernels.shapes.oracle import look
from cvg_kernels.shapes.pipeline import GUIDANCE_SCALE, STEPS
from cvg_kernels.shapes.world import DIRECTIONS, FRAMES, SIZE, Thing, caption, random_scene, random_things, render
from cvg_kernels.training.features import examples_of, record_entities
from cvg_kernels.training.inversion import add_noise, ddim_invert
from cvg_kernels.training.store import GENERATED, RIGHT_PROMPT, WRONG_PROMPT, Examples

#: Which way an entity moves; or nowhere: the clip does not show it, or shows it without a clear motion. The last is
#: read off generated clips only, and gives guidance something to lead away from.
LABELS = (*DIRECTIONS, "nowhere")
_ENTITIES = 2  # the most that a clip shows


@dataclass(frozen=True)
class Clips:
    """Which examples are made, and how.

    Attributes:
        real: number of clips of the world that are inverted.
        generated: number of clips that the pipeline makes from random prompts of two things, labelled by what they
            show. Prompts of one thing nearly always come out right and so teach nothing.
        dual: invert real clips with a wrong prompt as well (dual inversion).
        noise: noise real clips instead of inverting them.
        read_steps: how many of the first denoising steps are read.
        steps: number of steps of the sampler.
        seed: random seed of everything.
    """

    real: int = 300
    generated: int = 1200
    dual: bool = True
    noise: bool = False
    read_steps: int = 8
    steps: int = STEPS
    seed: int = 0

    @property
    def labels(self) -> tuple[str, ...]:
        """What can be true of a thing."""
        return LABELS

    @property
    def ends(self) -> tuple[int, int]:
        """The first numbers are clips of the world, the others generated."""
        return self.real, self.real + self.generated

    def grid(self, pipe: Any) -> tuple[int, int, int]:
        """Frames, rows and columns of the features."""
        size = pipe.unet.config.sample_size
        return FRAMES, size, size

    def make(self, pipe: Any, selection: Selection, numbers: range) -> Examples:
        """Makes the examples of some clips, all of a kind; each depends on the seed and its number alone."""
        return (_real if numbers[0] < self.real else _generated)(pipe, self, selection, numbers)


def _draw(clips: Clips, numbers: range) -> list[np.random.Generator]:
    return [np.random.default_rng((clips.seed, 5, number)) for number in numbers]


def _real(pipe: Any, clips: Clips, selection: Selection, numbers: range) -> Examples:
    """Clips of the world: inverted with the right prompt, and with a wrong one, and replayed."""
    draws = _draw(clips, numbers)
    scenes = [random_scene(rng) for rng in draws]
    with torch.no_grad():
        images = render(scenes).flatten(0, 1) * 2 - 1
        clean = pipe.vae.encode(images.to(pipe.device)).latent_dist.mean
    clean = clean.unflatten(0, (len(scenes), -1)).transpose(1, 2) * pipe.vae.config.scaling_factor

    things = [scene.things for scene in scenes]
    told = [(RIGHT_PROMPT, things)]
    if clips.dual:
        told.append((WRONG_PROMPT, [_lie(rng, each) for rng, each in zip(draws, things, strict=True)]))
    parts = []
    for source, said in told:
        prompts = [caption(each) for each in said]
        if clips.noise:
            generator = torch.Generator().manual_seed(clips.seed * 1_000_003 + numbers[0])
            noisy = add_noise(pipe, clean, steps=clips.steps, generator=generator)
        else:
            noisy = ddim_invert(pipe, clean, prompts, steps=clips.steps)
        maps, _ = _record(pipe, clips, selection, said, video=False, latents=noisy)
        parts.append(_examples(maps, things, said, source, numbers))
    return Examples.join(parts)


def _lie(rng: np.random.Generator, things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    """The same things, each with another direction."""
    return tuple(
        replace(thing, direction=str(rng.choice([d for d in DIRECTIONS if d != thing.direction]))) for thing in things
    )


def _generated(pipe: Any, clips: Clips, selection: Selection, numbers: range) -> Examples:
    """Clips that the pipeline makes; what is true of them is what the oracle sees, whatever the prompt said."""
    said = [random_things(rng, _ENTITIES, distinct_shapes=True) for rng in _draw(clips, numbers)]
    generators = [torch.Generator().manual_seed(clips.seed * 1_000_003 + number) for number in numbers]
    maps, frames = _record(pipe, clips, selection, said, video=True, generator=generators)
    shown = []
    for clip, things in zip(frames, said, strict=True):
        seen = {one.colour: one.direction for one in look(clip)}
        shown.append(tuple(replace(thing, direction=seen.get(thing.colour) or "nowhere") for thing in things))
    return _examples(maps, shown, said, GENERATED, numbers)


def _record(pipe, clips: Clips, selection: Selection, said, *, video: bool, **options):
    return record_entities(
        pipe,
        [caption(things) for things in said],
        LABELS,
        selection,
        steps=clips.read_steps,
        video=video,
        num_frames=FRAMES,
        height=SIZE,
        width=SIZE,
        num_inference_steps=clips.steps,
        guidance_scale=GUIDANCE_SCALE,
        **options,
    )


def _examples(maps: torch.Tensor, shown, said, source: int, numbers: range) -> Examples:
    true, asked = ([[LABELS.index(one.direction) for one in things] for things in clips] for clips in (shown, said))
    return examples_of(maps, true, asked, entities=_ENTITIES, source=source, numbers=numbers)
