"""What holds of every method that moves latents down a loss."""

from __future__ import annotations

from typing import Any

import torch

from tests.offline_pipelines import PROMPT, run
from tests.pipelines import SAME, in_float64


def assert_samples_apart(method: Any, pipe: Any, options: dict[str, Any], start: torch.Tensor):
    """The losses of two videos made together, from `start`, are those of each made alone; in float64."""
    pipe, options = in_float64((pipe, options))
    prompts = [PROMPT, "a dog and a red cat"]

    def losses(prompt, latents):
        with method.attach(pipe) as made:
            run(pipe, options, prompt, latents=latents)
        return torch.stack([entry["loss"] for entry in made.history])

    start = start.double()
    together = losses(prompts, start)
    for sample in range(2):
        alone = losses(prompts[sample], start[sample : sample + 1])
        torch.testing.assert_close(together[:, sample], alone[:, 0], **SAME)
