"""Guidance methods for unmodified diffusers pipelines: some move the latents before a step, some what a step predicts."""

from cvg_kernels.guidance.attach import Attachment, Method, Run, Step
from cvg_kernels.guidance.gen1 import Gen1, structure_frames, temporal_layers_off
from cvg_kernels.guidance.losses import fairness_loss
from cvg_kernels.guidance.vico import Vico

__all__ = [
    "Attachment",
    "Gen1",
    "Method",
    "Run",
    "Step",
    "Vico",
    "fairness_loss",
    "structure_frames",
    "temporal_layers_off",
]
