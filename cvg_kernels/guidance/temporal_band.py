"""VSTAR's regularisation as a loss: the gradient of the distance between temporal maps and a band moves the latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cvg_kernels.capture.layer_capture import LayerCapture
from cvg_kernels.capture.layers import attention_layers
from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.attach import Attachment, Run, Step
from cvg_kernels.guidance.descent import descend
from cvg_kernels.guidance.losses import band_distance, diagonality
from cvg_kernels.guidance.steps import LatentStepper, StepRule


@dataclass(frozen=True)
class TemporalBand:
    """Guidance by the gradient of how far temporal attention is from a band; attach it to a pipeline.

    Where `VSTAR` sets the maps, this leaves the network as it is and looks for latents whose maps are of that kind, so it
    combines with other losses.

    Attributes:
        loss: `"band"`: `losses.band_distance`; `"diagonality"`: 1 − `losses.diagonality`, mean over positions.
        sigma: width of the band in frames.
        step_rule: `"normalized"`, `"adam"` or `"sgd"`.
        step_size: see `LatentStepper`.
        until: share of the denoising steps that are guided, from the first.
        iterations: updates per guided step.
        backend: of the operations.
    """

    loss: Literal["band", "diagonality"] = "band"
    sigma: float = 1.0
    step_rule: StepRule = "normalized"
    step_size: float = 0.03
    until: float = 0.15
    iterations: int = 1
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.loss not in ("band", "diagonality"):
            raise ArgumentError(f"loss must be 'band' or 'diagonality', got {self.loss!r}")
        if not self.sigma > 0:
            raise ArgumentError(f"sigma must be positive, got {self.sigma!r}")
        if not 0 <= self.until <= 1:
            raise ArgumentError(f"until must lie in [0, 1], got {self.until!r}")

    def attach(self, pipe: Any, prompt: str | list[str] | None = None) -> Attachment:
        """Connects to a pipeline; a context manager that yields the `Run` with its history.

        Args:
            pipe: a diffusers pipeline with temporal attention (AnimateDiff, ModelScope, Latte).
            prompt: says what the prompt is if the pipeline is called with `prompt_embeds`.
        """
        return Attachment(self, pipe, prompt)

    def move(self, step: Step, run: Run) -> torch.Tensor | None:
        """Moves the latents of one denoising step; see `attach.Method`."""
        if step.index >= math.ceil(self.until * step.count):
            return None
        names = [
            layer.name for layer in attention_layers(step.denoiser) if layer.kind == "temporal"
        ]
        if not names:
            raise ArgumentError("the denoiser has no temporal attention layer to guide by")
        nothing = torch.zeros(step.latents.shape[0], 0, dtype=torch.int64)
        stepper = LatentStepper(self.step_rule, self.step_size)
        with LayerCapture(step.denoiser, nothing, (), names, backend=self.backend) as layers:
            return descend(
                step,
                run,
                lambda z: (self._loss(layers.run(lambda: step.denoise(z))), {}),
                stepper,
                iterations=self.iterations,
            )

    def _loss(self, maps: dict[str, torch.Tensor]) -> torch.Tensor:
        each = [
            band_distance(one, self.sigma) if self.loss == "band" else 1 - diagonality(one).mean(1)
            for one in maps.values()
        ]
        return torch.stack(each).mean(0)
