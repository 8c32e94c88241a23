"""The operations: public functions, their checks, and the choice of a backend."""

from cvg_kernels.ops._trace import trace_backends
from cvg_kernels.ops.attention import (
    CapturedAttention,
    CapturedMaps,
    attention_with_capture,
    capture_maps,
)
from cvg_kernels.ops.guidance_mix import guidance_mix
from cvg_kernels.ops.path_flow import min_max_matmul, path_flow
from cvg_kernels.ops.structure import depth_structure
from cvg_kernels.ops.token_peaks import token_peaks

__all__ = [
    "CapturedAttention",
    "CapturedMaps",
    "attention_with_capture",
    "capture_maps",
    "depth_structure",
    "guidance_mix",
    "min_max_matmul",
    "path_flow",
    "token_peaks",
    "trace_backends",
]
