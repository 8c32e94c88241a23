"""Features of a pipeline run: read at the start of the first steps, in the place where guidance reads them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from cvg_kernels.composition.features import FeatureReader, Selection
from cvg_kernels.guidance.base import Guidance
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.session import Run
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.token_table import TokenTable
from cvg_kernels.prompts.tokens import Word


class _Recorded(Exception):
    """Ends a run whose video nobody wants; never leaves `record`."""


@dataclass(frozen=True)
class _Recorder(Guidance):
    """A guidance method that looks and moves nothing."""

    selection: Selection
    steps: int
    phrases: list[list[Word]]
    ends: bool  # whether the run ends with the last step that is read

    @property
    def idle(self) -> bool:
        """It means to change nothing."""
        return True

    def before_step(self, call: Call, run: Run) -> None:
        """Reads the features of a step; see `Guidance`."""
        if call.index < self.steps:
            table = TokenTable.of(call.find(self.phrases)).to(call.latents.device)
            with torch.no_grad(), FeatureReader(call.denoiser, self.selection, table) as reader:
                maps = reader.read(lambda: call.denoise(call.latents))
            run.history.append({"timestep": call.timestep, "maps": maps.cpu()})
        if self.ends and call.index + 1 >= self.steps:
            raise _Recorded


def record(
    pipe: VideoPipeline,
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
        **options: options of the pipeline's call.

    Returns:
        Maps `[B, T, E, M, F, h, w]`; the timesteps of the T steps; the frames `[B, F, 3, H, W]` or `None`.
    """
    frames = None
    recorder = _Recorder(selection, steps, phrases, ends=not video)
    with recorder.attach(pipe) as run, suppress(_Recorded):
        frames = pipe(prompts, output_type="pt", **options).frames.float().cpu()
    maps = torch.stack([entry["maps"] for entry in run.history], dim=1)
    return maps, [entry["timestep"] for entry in run.history], frames
