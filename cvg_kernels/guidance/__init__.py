"""Guidance methods: each moves the latents before a denoising step, on unmodified diffusers pipelines."""

from cvg_kernels.guidance.attach import Attachment, Method, Run, Step
from cvg_kernels.guidance.losses import band_distance, diagonality, fairness_loss
from cvg_kernels.guidance.temporal_band import TemporalBand
from cvg_kernels.guidance.vico import Vico
from cvg_kernels.guidance.vstar import VSTAR

__all__ = [
    "VSTAR",
    "Attachment",
    "Method",
    "Run",
    "Step",
    "TemporalBand",
    "Vico",
    "band_distance",
    "diagonality",
    "fairness_loss",
]
