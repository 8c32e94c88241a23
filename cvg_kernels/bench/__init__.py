"""Measurements: timing against what people use today, and what compilers make of the kernels."""

from __future__ import annotations

#: What `cvg-kernels bench` measures, each by the module of its name here.
BENCHMARKS = (
    "attention",
    "compiled",
    "frame_band_attention",
    "guidance",
    "guidance_mix",
    "max_flow",
    "path_flow",
    "temporal_attention",
    "temporal_maps",
)
