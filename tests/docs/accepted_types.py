"""What a type checker must accept: `make types` reads this file, and nothing runs it."""

from __future__ import annotations

import torch
from diffusers import (
    AnimateDiffPipeline,
    CogVideoXPipeline,
    LattePipeline,
    ModularPipeline,
    TextToVideoSDPipeline,
    WanPipeline,
)

import cvg_kernels as cvg


def every_kind_of_pipeline(
    unet: AnimateDiffPipeline | TextToVideoSDPipeline,
    transformer: WanPipeline | CogVideoXPipeline | LattePipeline,
    modular: ModularPipeline,
    editor: cvg.StructureContentPipeline,
) -> None:
    """With `encode_prompt` and without, of diffusers and ours."""
    for pipe in (unet, transformer, modular, editor):
        with cvg.capture(pipe, words=["cat"]), cvg.CVG().attach(pipe), cvg.processors(pipe):
            pass
        cvg.Together((cvg.Vico(), cvg.VSTAR())).attach(pipe)
        cvg.use_processors(pipe).restore()


def a_denoiser_for_the_swap(denoiser: torch.nn.Module) -> None:
    """The swap takes a denoiser, too."""
    cvg.use_processors(denoiser)


def users_own(pipe: cvg.VideoPipeline) -> torch.Tensor:
    """Code of a user that takes any pipeline."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with cvg.Gen1(temporal_scale=1.5).attach(pipe) as run:
        video: torch.Tensor = pipe("a cat", output_type="pt").frames
    assert run.guided_steps
    return video


def results_have_types(query: torch.Tensor) -> torch.Tensor:
    """Names that are loaded when they are used have their types all the same."""
    captured: cvg.CapturedAttention = cvg.attention_with_capture(query, query, query, [0])
    return captured.out
