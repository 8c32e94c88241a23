"""The kernels of attention and of attention with a band, for calls in the form that they had before the one core."""

from __future__ import annotations

from types import ModuleType

import torch

from cvg_kernels.backends import Backend
from cvg_kernels.kernels import Facts
from cvg_kernels.ops._choice import kernel_for
from cvg_kernels.ops._registration import KERNEL_DEVICES, refuse_second_derivative

__all__ = [
    "KERNEL_DEVICES",
    "attention_module",
    "frame_band_attention_module",
    "refuse_second_derivative",
]


def attention_module(backend: Backend, query: torch.Tensor) -> tuple[Backend, ModuleType]:
    """The backend that serves a call of attention, and its module."""
    return kernel_for("attention", backend.value, Facts(query.device, query.dtype))


def frame_band_attention_module(
    backend: Backend, query: torch.Tensor
) -> tuple[Backend, ModuleType]:
    """The backend that serves a call of attention with a band by frames, and its module."""
    return kernel_for("frame_band_attention", backend.value, Facts(query.device, query.dtype))
