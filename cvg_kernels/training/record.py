"""Features of a pipeline run: read at the start of the first steps, in the place where guidance reads them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from cvg_kernels.capture.tokens import Word
from cvg_kernels.composition.features import EntityTokens, FeatureReader, Selection
from cvg_kernels.guidance.attach import Attachment, Run, Step


class _Recorded(Exception):
    """Ends a run whose video nobody wants; never leaves `record`."""


class _Recorder:
    """A guidance method that looks and moves nothing."""

    def __init__(
        self, selection: Selection, steps: int, phrases: list[list[Word]], stop: bool
    ) -> None:
        self.selection = selection
        self.steps = steps
        self.phrases = phrases
        self.stop = stop

    def move(self, step: Step, run: Run) -> None:
        """Reads the features of a step; see `attach.Method`."""
        if step.index < self.steps:
            tokens = EntityTokens.of(step.pipe.tokenizer, step.prompts, self.phrases)
            with torch.no_grad(), FeatureReader(step.denoiser, self.selection, tokens) as reader:
                maps = reader.read(lambda: step.denoise(step.latents))
            run.history.append({"timestep": step.timestep, "maps": maps.cpu()})
        if self.stop and step.index + 1 >= self.steps:
            raise _Recorded


def record(
    pipe: Any,
    prompts: list[str],
    phrases: list[list[Word]],
    selection: Selection,
    *,
    steps: int,
    video: bool,
    **options: Any,
) -> tuple[torch.Tensor, list[float], torch.Tensor | None]:
    """Runs a pipeline and returns the features of its first steps.

    Args:
        pipe: a diffusers pipeline.
        prompts: one a clip.
        phrases: per prompt, the words of each entity.
        selection: which maps.
        steps: how many steps to read.
        video: whether to make the video; `False` ends the run after the last step read.
        **options: of the pipeline's call.

    Returns:
        Maps `[B, T, E, M, F, h, w]`; the timesteps of the T steps; the frames `[B, F, 3, H, W]` or `None`.
    """
    frames = None
    recorder = _Recorder(selection, steps, phrases, stop=not video)
    with Attachment(recorder, pipe) as run, suppress(_Recorded):
        frames = pipe(prompts, output_type="pt", **options).frames.float().cpu()
    maps = torch.stack([entry["maps"] for entry in run.history], dim=1)
    return maps, [entry["timestep"] for entry in run.history], frames
