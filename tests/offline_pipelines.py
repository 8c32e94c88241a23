"""The five tiny text-to-video pipelines that most tests run on, one for each denoiser; all others: tests/pipelines."""

from __future__ import annotations

from typing import Any

import torch

from tests.pipelines import PIPELINES, PROMPT, denoisers, run
from tests.pipelines.latte import LATTE_TOKENS
from tests.pipelines.parts import TOKENS, word_tokenizer

__all__ = [
    "BUILDERS",
    "LATENTS",
    "LATTE_TOKENS",
    "PROMPT",
    "TOKENS",
    "animatediff",
    "cogvideox",
    "latte",
    "modelscope",
    "noise",
    "run",
    "wan",
    "word_tokenizer",
]

animatediff = PIPELINES["animatediff"].build
modelscope = PIPELINES["modelscope"].build
latte = PIPELINES["latte"].build
wan = PIPELINES["wan"].build
cogvideox = PIPELINES["cogvideox"].build

BUILDERS = {"animatediff": animatediff, "modelscope": modelscope, "latte": latte, "wan": wan, "cogvideox": cogvideox}

#: Frames, rows and columns of each one's latents.
LATENTS = {name: PIPELINES[name].latents for name in BUILDERS}


def noise(name: str, pipe: Any, samples: int) -> torch.Tensor:
    """Random latents for a pipeline of `PIPELINES`, its axes in its order."""
    case = PIPELINES[name]
    channels = denoisers(pipe)[0].config.in_channels - case.condition_channels
    return torch.randn(samples, channels, *case.latents).movedim(1, case.channel_axis)
