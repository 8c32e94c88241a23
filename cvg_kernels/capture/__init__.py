"""Capture on diffusers: which attention is which, words to tokens, the drop-in processors, and the records."""

from cvg_kernels.capture.capture import Capture, Record, capture
from cvg_kernels.capture.layer_capture import LayerCapture
from cvg_kernels.capture.processors import ProcessorSwap, processors, use_processors

__all__ = [
    "Capture",
    "LayerCapture",
    "ProcessorSwap",
    "Record",
    "capture",
    "processors",
    "use_processors",
]
