"""Guidance methods for unmodified diffusers pipelines:
some move the latents before a step, some what a step predicts.
"""

from cvg_kernels.guidance.base import Guidance
from cvg_kernels.guidance.cvg import CVG
from cvg_kernels.guidance.flowmo import FlowMo
from cvg_kernels.guidance.gen1 import Gen1, structure_frames
from cvg_kernels.guidance.losses import (
    band_distance,
    binding_loss,
    concentration_loss,
    diagonal_roughness,
    diagonality,
    fairness_loss,
    motion_variance,
    separation_loss,
)
from cvg_kernels.guidance.temporal_band import TemporalBand
from cvg_kernels.guidance.together import Together
from cvg_kernels.guidance.vico import Vico
from cvg_kernels.guidance.vstar import VSTAR
from cvg_kernels.pipeline.session import PipelineSession, Run
from cvg_kernels.pipeline.temporal_layers import temporal_layers_off

__all__ = [
    "CVG",
    "VSTAR",
    "FlowMo",
    "Gen1",
    "Guidance",
    "PipelineSession",
    "Run",
    "TemporalBand",
    "Together",
    "Vico",
    "band_distance",
    "binding_loss",
    "concentration_loss",
    "diagonal_roughness",
    "diagonality",
    "fairness_loss",
    "motion_variance",
    "separation_loss",
    "structure_frames",
    "temporal_layers_off",
]
