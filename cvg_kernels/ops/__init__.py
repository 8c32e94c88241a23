"""The operations: public functions, their checks, and the choice of a backend."""

from cvg_kernels.ops._trace import trace_backends
from cvg_kernels.ops.attention import (
    CapturedAttention,
    CapturedMaps,
    attention_alone,
    attention_with_capture,
    capture_maps,
)
from cvg_kernels.ops.coupled_max_flow import CoupledFlow, coupled_max_flow
from cvg_kernels.ops.depth_structure import depth_structure
from cvg_kernels.ops.frame_band_attention import (
    FrameBand,
    FrameBandAttention,
    first_highest_keys,
    frame_band_attention,
)
from cvg_kernels.ops.guidance_mix import guidance_mix
from cvg_kernels.ops.max_flow import MaxFlow, SubgraphFlow, max_flow, subgraph_max_flow
from cvg_kernels.ops.min_max_matmul import min_max_matmul
from cvg_kernels.ops.path_flow import path_flow
from cvg_kernels.ops.temporal_attention import TemporalAttention, temporal_attention
from cvg_kernels.ops.temporal_maps import temporal_maps
from cvg_kernels.ops.token_peaks import token_peaks

__all__ = [
    "CapturedAttention",
    "CapturedMaps",
    "CoupledFlow",
    "FrameBand",
    "FrameBandAttention",
    "MaxFlow",
    "SubgraphFlow",
    "TemporalAttention",
    "attention_alone",
    "attention_with_capture",
    "capture_maps",
    "coupled_max_flow",
    "depth_structure",
    "first_highest_keys",
    "frame_band_attention",
    "guidance_mix",
    "max_flow",
    "min_max_matmul",
    "path_flow",
    "subgraph_max_flow",
    "temporal_attention",
    "temporal_maps",
    "token_peaks",
    "trace_backends",
]
