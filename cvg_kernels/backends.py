"""The backends: their names, which operation has which, and why one cannot run here."""

from __future__ import annotations

import importlib
import os
from enum import Enum
from typing import TYPE_CHECKING

from cvg_kernels import native
from cvg_kernels.errors import ArgumentError, BackendUnavailableError

if TYPE_CHECKING:
    import torch


class Backend(str, Enum):
    """Who computes an operation."""

    AUTO = "auto"  #: the fastest one that can
    REFERENCE = "reference"  #: plain PyTorch, the definition
    STOCK = "stock"  #: torch's own fused attention, and our maps
    NATIVE = "native"  #: C++ on CPU tensors
    TRITON = "triton"  #: Triton on GPU tensors
    CUDA = "cuda"  #: CUDA C++ on NVIDIA GPU tensors


#: Every operation and the backends it has.
OPERATIONS: dict[str, tuple[Backend, ...]] = {
    "attention": (Backend.REFERENCE, Backend.NATIVE, Backend.TRITON),
    "path_flow": (Backend.REFERENCE, Backend.NATIVE, Backend.TRITON),
    "token_peaks": (Backend.REFERENCE, Backend.NATIVE, Backend.TRITON),
    "coupled_flow": (Backend.REFERENCE, Backend.NATIVE),
    "max_flow": (Backend.REFERENCE, Backend.NATIVE, Backend.CUDA),
    "temporal_attention": (Backend.REFERENCE, Backend.NATIVE, Backend.TRITON, Backend.CUDA),
    "frame_band_attention": (Backend.REFERENCE, Backend.NATIVE, Backend.TRITON),
    "guidance_mix": (Backend.REFERENCE, Backend.NATIVE, Backend.TRITON),
    "structure": (Backend.REFERENCE,),
}


def parse_backend(backend: str | Backend) -> Backend:
    """Turns a name into a `Backend`.

    Raises:
        ArgumentError: for a name that is none; lists those there are.
    """
    try:
        return Backend(backend)
    except ValueError:
        names = ", ".join(repr(member.value) for member in Backend)
        raise ArgumentError(f"backend must be one of {names}, got {backend!r}") from None


def unavailable_reason(
    operation: str, backend: Backend, device: torch.device | None = None
) -> str | None:
    """Why `backend` cannot serve `operation`, or `None` if it can.

    Args:
        operation: a key of `OPERATIONS`.
        backend: which one.
        device: of the tensors; `None` asks about this machine as a whole.
    """
    if backend not in OPERATIONS[operation]:
        there = ", ".join(member.value for member in OPERATIONS[operation])
        return f"{operation} has no {backend.value} kernel; it has {there}"
    if backend is Backend.NATIVE:
        if device is not None and device.type != "cpu":
            return f"the native kernels take CPU tensors, these are on {device}"
        return native.reason("cpu")
    if backend is Backend.TRITON:
        return _triton_reason(device)
    if backend is Backend.CUDA:
        if device is not None and device.type != "cuda":
            return f"the CUDA kernels take tensors on an NVIDIA GPU, these are on {device}"
        return native.reason("cuda")
    return None


def require(operation: str, backend: Backend, device: torch.device | None = None) -> None:
    """Checks that a backend can run.

    Raises:
        BackendUnavailableError: with the reason, if it cannot.
    """
    reason = unavailable_reason(operation, backend, device)
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend.value!r} cannot run {operation}: {reason}")


def _triton_reason(device: torch.device | None) -> str | None:
    import torch

    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error} (pip install triton; Linux only)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # kernels run on CPU tensors, slowly: for tests
    if device is not None and device.type != "cuda":
        return f"Triton kernels take tensors on a GPU, these are on {device}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    return None
