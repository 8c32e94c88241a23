"""VSTAR's regularisation as a loss:
the gradient of the distance between temporal maps and a band moves the latents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.base import Guidance, check_choice, check_count, check_number
from cvg_kernels.guidance.descent import descend
from cvg_kernels.guidance.losses import band_distance, diagonal_roughness, diagonality
from cvg_kernels.guidance.steps import STEP_RULES, LatentStepper, StepRule
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.guards import check_extra_forwards
from cvg_kernels.pipeline.layer_capture import LayerCapture
from cvg_kernels.pipeline.layers import check_undivided, frame_maps
from cvg_kernels.pipeline.models import denoisers_of
from cvg_kernels.pipeline.session import Run
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


@dataclass(frozen=True)
class TemporalBand(Guidance):
    """Guidance by the gradient of how far temporal attention is from a band; attach it to a pipeline.

    Where `VSTAR` sets the maps, this leaves the network as it is and looks for latents whose maps are of that kind, so
    it combines with other losses. In networks whose attention spans the video the maps are those between frames at
    every place (`temporal_maps`), of the frames alone.

    Attributes:
        loss: `"band"`: `losses.band_distance`; `"diagonality"`: 1 − `losses.diagonality`, mean over positions;
            `"roughness"`: `losses.diagonal_roughness`, after TeDiO, which smooths diagonals and asks for no band.
        sigma: width of the band in frames.
        worst: share of the positions, those with the roughest diagonals, that `"roughness"` looks at.
        step_rule: `"normalized"`, `"adam"` or `"sgd"`.
        step_size: see `LatentStepper`.
        iterations: updates per guided step.
        backend: which implementation of the operations to use.
        stop: share of the denoising steps that are guided.
    """

    loss: Literal["band", "diagonality", "roughness"] = "band"
    sigma: float = 1.0
    worst: float = field(default=0.1, kw_only=True)
    step_rule: StepRule = "normalized"
    step_size: float = 0.03
    iterations: int = 1
    backend: str = "auto"
    stop: float = field(default=0.15, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, ("band", "diagonality", "roughness"))
        check_number("sigma", self.sigma, above=0)
        check_number("worst", self.worst, 0, 1, above=0)
        check_choice("step_rule", self.step_rule, STEP_RULES)
        check_number("step_size", self.step_size, 0)
        check_count("iterations", self.iterations)

    @property
    def idle(self) -> bool:
        """Whether no update is asked for."""
        return super().idle or self.iterations == 0

    def check(self, pipe: VideoPipeline) -> None:
        """Checks that the pipeline has temporal attention, and sees a video as a whole.

        Raises:
            ArgumentError: if not.
        """
        for denoiser in denoisers_of(pipe):
            check_extra_forwards(denoiser)
            if not frame_maps(denoiser):
                raise ArgumentError("pipe must have layers in which frames attend to each other to guide by, got none")
            check_undivided(denoiser)

    def before_step(self, call: Call, run: Run) -> torch.Tensor | None:
        """Moves the latents of one denoising step; see `Guidance`."""
        if self.iterations == 0:
            return None
        names = list(frame_maps(call.denoiser))
        no_words = torch.zeros(call.latents.shape[0], 0, dtype=torch.int64)
        stepper = LatentStepper(self.step_rule, self.step_size)
        with LayerCapture(call.denoiser, no_words, (), names, backend=self.backend) as layers:
            return descend(
                call,
                run,
                lambda z: (self._loss(layers.run(lambda: call.denoise(z))), {}),
                stepper,
                iterations=self.iterations,
            )

    def _loss(self, maps: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = {
            "band": lambda one: band_distance(one, self.sigma),
            "diagonality": lambda one: 1 - diagonality(one).mean(1),
            "roughness": lambda one: diagonal_roughness(one, self.worst),
        }
        return torch.stack([losses[self.loss](one) for one in maps.values()]).mean(0)
