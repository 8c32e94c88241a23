"""Ways to make an edit: the editor with one thing changed, and what one would do without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cvg_kernels.editing.content import embed_texts
from cvg_kernels.guidance import Gen1
from cvg_kernels.pipeline.temporal_layers import temporal_layers_off
from cvg_kernels.shapes.edit_tasks import EditTask
from cvg_kernels.shapes.pipeline import GUIDANCE_SCALE, STEPS

#: Makes clips `[B, F, 3, H, W]` of tasks and seeds.
Arm = Callable[[Sequence[EditTask], Sequence[int]], torch.Tensor]
LEVELS = tuple(range(8))
#: The level of all comparisons that are not about the level.
STRUCTURE = 2
TEMPORAL_SCALES = (0.5, 1.5, 2.0, 3.0)
STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9)


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def edit(pipe: Any, tasks: Sequence[EditTask], seeds: Sequence[int], **options: Any) -> torch.Tensor:
    """Edits the clips of tasks.

    Args:
        pipe: the editor.
        tasks: what is asked for.
        seeds: one a clip.
        **options: options of the pipeline's call, instead of the prompts at `STRUCTURE`.
    """
    defaults = {"prompt": [task.prompt for task in tasks], "structure": STRUCTURE}
    if "depth" not in options:
        defaults["video"] = torch.stack([task.clip for task in tasks])
    return pipe(
        **{**defaults, **options},
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=_generators(seeds),
        output_type="pt",
    ).frames


def level_arms(pipe: Any) -> dict[str, Arm]:
    """The editor at every structure level, and told the structure of another task's clip,
    so that the own is ignored.
    """

    def other(tasks: Sequence[EditTask], seeds: Sequence[int]) -> torch.Tensor:
        clips = torch.stack([task.clip for task in tasks]).roll(1, 0)
        return edit(pipe, tasks, seeds, video=clips)

    levels: dict[str, Arm] = {
        f"structure={level}": lambda tasks, seeds, level=level: edit(pipe, tasks, seeds, structure=level)
        for level in LEVELS
    }
    return {**levels, "structure of another clip": other}


def content_arms(pipe: Any, diffusion_prior: Any = None, scheduler: Any = None) -> dict[str, Arm]:
    """What says what is to be seen: an image, a text, each way that a text can take, and both.

    Args:
        pipe: the editor.
        diffusion_prior: a prior of the other kind, to compare.
        scheduler: its noise schedule.
    """

    def pictures(tasks: Sequence[EditTask]) -> torch.Tensor:
        return torch.stack([task.picture for task in tasks])

    def image(tasks: Sequence[EditTask], seeds: Sequence[int]) -> torch.Tensor:
        return edit(pipe, tasks, seeds, prompt=None, image=pictures(tasks))

    def image_and_words(tasks: Sequence[EditTask], seeds: Sequence[int]) -> torch.Tensor:
        return edit(pipe, tasks, seeds, image=pictures(tasks))

    def words_only(tasks: Sequence[EditTask], seeds: Sequence[int]) -> torch.Tensor:
        width = pipe.content_encoder.config.projection_dim
        with _content(pipe, lambda texts: torch.zeros(len(texts), width)):
            return edit(pipe, tasks, seeds)

    def without_words(tasks: Sequence[EditTask], seeds: Sequence[int], through_prior: bool = True):
        texts = [task.prompt for task in tasks]
        found = pipe.encode_content(texts, None) if through_prior else _raw(pipe, texts)
        with _content(pipe, lambda _: found):
            return edit(pipe, tasks, seeds, prompt=None, image=pictures(tasks))

    def raw(tasks: Sequence[EditTask], seeds: Sequence[int]) -> torch.Tensor:
        return without_words(tasks, seeds, through_prior=False)

    arms: dict[str, Arm] = {
        "image": image,
        "image and words": image_and_words,
        "words alone": words_only,
        "text through the prior, no words": without_words,
        "text embedding itself, no words": raw,
    }
    if diffusion_prior is not None:

        def diffusion(tasks: Sequence[EditTask], seeds: Sequence[int]) -> torch.Tensor:
            parts = pipe.prior, pipe.prior_scheduler
            pipe.register_modules(prior=diffusion_prior, prior_scheduler=scheduler)
            try:
                torch.manual_seed(seeds[0])
                return without_words(tasks, seeds)
            finally:
                pipe.register_modules(prior=parts[0], prior_scheduler=parts[1])

        arms["text through a diffusion prior, no words"] = diffusion
    return arms


def _raw(pipe: Any, texts: Sequence[str]) -> torch.Tensor:
    return embed_texts(pipe.content_encoder, pipe._tokens(texts)).detach()


@contextmanager
def _content(pipe: Any, content: Callable[[Sequence[Any]], torch.Tensor]) -> Iterator[None]:
    """Gives the pipeline other embeddings of the content, whether it asks for those of texts or of images."""
    pipe.encode_content = lambda prompt, image, generator=None: content(prompt if image is None else image)
    try:
        yield
    finally:
        del pipe.encode_content


def temporal_arms(pipe: Any, scales: Sequence[float] = TEMPORAL_SCALES) -> dict[str, Arm]:
    """The editor under Gen-1's temporal scale, and frame by frame, without its temporal layers."""

    def at(scale: float) -> Arm:
        def run(tasks: Sequence[EditTask], seeds: Sequence[int]) -> torch.Tensor:
            with Gen1(temporal_scale=scale).attach(pipe):
                return edit(pipe, tasks, seeds)

        return run

    def alone(tasks: Sequence[EditTask], seeds: Sequence[int]) -> torch.Tensor:
        with temporal_layers_off(pipe.unet):
            return edit(pipe, tasks, seeds)

    return {**{f"temporal_scale={scale:g}": at(scale) for scale in scales}, "frame by frame": alone}


def sdedit_arms(world: Any, strengths: Sequence[float] = STRENGTHS) -> dict[str, Arm]:
    """SDEdit: the untouched shapes pipeline noises the clip and denoises it with a prompt, which tells the motion as
    well.

    Args:
        world: the shapes pipeline.
        strengths: share of the noise.
    """
    from diffusers import AnimateDiffVideoToVideoPipeline

    pipe = AnimateDiffVideoToVideoPipeline(
        vae=world.vae,
        text_encoder=world.text_encoder,
        tokenizer=world.tokenizer,
        unet=world.unet,
        motion_adapter=None,
        scheduler=world.scheduler,
    )
    pipe.set_progress_bar_config(disable=True)

    def at(strength: float) -> Arm:
        def run(tasks: Sequence[EditTask], seeds: Sequence[int]) -> torch.Tensor:
            return pipe(
                video=[task.clip for task in tasks],
                prompt=[task.prompt_with_motion for task in tasks],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                strength=strength,
                generator=_generators(seeds),
                output_type="pt",
            ).frames

        return run

    return {f"SDEdit, strength {strength:g}": at(strength) for strength in strengths}
