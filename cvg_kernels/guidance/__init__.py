"""Guidance methods: each moves the latents before a denoising step, on unmodified diffusers pipelines."""

from cvg_kernels.guidance.attach import Attachment, Method, Run, Step
from cvg_kernels.guidance.cvg import CVG
from cvg_kernels.guidance.losses import fairness_loss
from cvg_kernels.guidance.together import Together
from cvg_kernels.guidance.vico import Vico

__all__ = ["CVG", "Attachment", "Method", "Run", "Step", "Together", "Vico", "fairness_loss"]
