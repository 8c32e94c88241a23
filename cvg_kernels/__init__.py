"""Steer text-to-video diffusion models at inference time.

Fused attention that also returns the maps of chosen text tokens, the flow of tokens through
attention graphs, and the guidance methods built on them, for diffusers pipelines. Names are loaded
when they are first used: importing the package imports neither triton, diffusers nor compiled code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

#: Public name → the module that it is loaded from.
_HOMES = {
    "ArgumentError": "errors",
    "CVG": "guidance",
    "Backend": "backends",
    "BackendUnavailableError": "errors",
    "CapturedAttention": "ops",
    "CapturedMaps": "ops",
    "CoupledFlow": "ops",
    "CompositionClassifier": "composition",
    "CvgError": "errors",
    "FlowMo": "guidance",
    "FrameBand": "ops",
    "FrameBandAttention": "ops",
    "Gen1": "guidance",
    "MaxFlow": "ops",
    "StructureContentPipeline": "editing",
    "SubgraphFlow": "ops",
    "TemporalAttention": "ops",
    "TemporalBand": "guidance",
    "GuidanceWarning": "errors",
    "PipelineSession": "guidance",
    "Together": "guidance",
    "TokenSpan": "prompts.tokens",
    "VSTAR": "guidance",
    "Vico": "guidance",
    "VideoPipeline": "pipeline.video_pipeline",
    "attention_with_capture": "ops",
    "capture_maps": "ops",
    "coupled_max_flow": "ops",
    "depth_structure": "ops",
    "frame_band_attention": "ops",
    "guidance_mix": "ops",
    "max_flow": "ops",
    "min_max_matmul": "ops",
    "path_flow": "ops",
    "capture": "capturing",
    "processors": "pipeline.swap",
    "subgraph_max_flow": "ops",
    "temporal_attention": "ops",
    "temporal_maps": "ops",
    "token_peaks": "ops",
    "trace_backends": "ops",
    "use_processors": "pipeline.swap",
}
#: Modules among the public names.
_MODULES = ("guidance", "shapes", "viz")

__all__ = [
    "CVG",
    "VSTAR",
    "ArgumentError",
    "Backend",
    "BackendUnavailableError",
    "CapturedAttention",
    "CapturedMaps",
    "CompositionClassifier",
    "CoupledFlow",
    "CvgError",
    "FlowMo",
    "FrameBand",
    "FrameBandAttention",
    "Gen1",
    "GuidanceWarning",
    "MaxFlow",
    "PipelineSession",
    "StructureContentPipeline",
    "SubgraphFlow",
    "TemporalAttention",
    "TemporalBand",
    "Together",
    "TokenSpan",
    "Vico",
    "VideoPipeline",
    "__version__",
    "attention_with_capture",
    "capture",
    "capture_maps",
    "coupled_max_flow",
    "depth_structure",
    "frame_band_attention",
    "guidance",
    "guidance_mix",
    "max_flow",
    "min_max_matmul",
    "path_flow",
    "processors",
    "shapes",
    "subgraph_max_flow",
    "temporal_attention",
    "temporal_maps",
    "token_peaks",
    "trace_backends",
    "use_processors",
    "viz",
]


def __getattr__(name: str) -> object:
    """Loads a public name when it is first used (PEP 562)."""
    if name in _HOMES:
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _MODULES:
        found = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(__all__)


if TYPE_CHECKING:
    from cvg_kernels import guidance, shapes, viz
    from cvg_kernels.backends import Backend
    from cvg_kernels.capturing import capture
    from cvg_kernels.composition import CompositionClassifier
    from cvg_kernels.editing import StructureContentPipeline
    from cvg_kernels.errors import ArgumentError, BackendUnavailableError, CvgError, GuidanceWarning
    from cvg_kernels.guidance import CVG, VSTAR, FlowMo, Gen1, PipelineSession, TemporalBand, Together, Vico
    from cvg_kernels.ops import (
        CapturedAttention,
        CapturedMaps,
        CoupledFlow,
        FrameBand,
        FrameBandAttention,
        MaxFlow,
        SubgraphFlow,
        TemporalAttention,
        attention_with_capture,
        capture_maps,
        coupled_max_flow,
        depth_structure,
        frame_band_attention,
        guidance_mix,
        max_flow,
        min_max_matmul,
        path_flow,
        subgraph_max_flow,
        temporal_attention,
        temporal_maps,
        token_peaks,
        trace_backends,
    )
    from cvg_kernels.pipeline.swap import processors, use_processors
    from cvg_kernels.pipeline.video_pipeline import VideoPipeline
    from cvg_kernels.prompts.tokens import TokenSpan
