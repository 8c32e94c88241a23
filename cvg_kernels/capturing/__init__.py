"""Capture on diffusers pipelines: the maps of words, step by step and layer by layer."""

from cvg_kernels.capturing.capture import Capture, capture
from cvg_kernels.capturing.records import Record

__all__ = ["Capture", "Record", "capture"]
