"""Guidance methods: each moves the latents before a denoising step, on unmodified diffusers pipelines."""

from cvg_kernels.guidance.attach import Attachment, Method, Run, Step
from cvg_kernels.guidance.losses import fairness_loss
from cvg_kernels.guidance.vico import Vico

__all__ = ["Attachment", "Method", "Run", "Step", "Vico", "fairness_loss"]
