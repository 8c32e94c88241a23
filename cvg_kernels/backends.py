"""The backends: their names, which operation has which, and why one cannot run here."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from cvg_kernels import native
from cvg_kernels.errors import ArgumentError, BackendUnavailableError, nearest
from cvg_kernels.kernels import KERNELS, TRITON_BACKENDS, Backend, kernels_of

if TYPE_CHECKING:
    import torch

__all__ = ["OPERATIONS", "Backend", "parse_backend", "require", "unavailable_reason"]

#: Every operation that users call and the backends it has, the reference first.
OPERATIONS: dict[str, tuple[Backend, ...]] = {
    operation: tuple(kernels) for operation, kernels in KERNELS.items() if not operation.endswith("_backward")
}


def parse_backend(backend: str | Backend) -> Backend:
    """Turns a name into a `Backend`.

    Raises:
        ArgumentError: for a name that is none; lists those there are.
    """
    try:
        return Backend(backend)
    except ValueError:
        names = [member.value for member in Backend]
        raise ArgumentError(
            f"backend must be one of {', '.join(map(repr, names))}, got {backend!r}{nearest(backend, names)}"
        ) from None


def unavailable_reason(
    operation: str, backend: Backend, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """Why `backend` cannot serve `operation`, or `None` if it can.

    Args:
        operation: a key of `OPERATIONS`, or the backward pass of one.
        backend: which one.
        device: device of the tensors; `None` asks about this machine as a whole.
        dtype: dtype of the tensors; `None` is float32. Only torch's own attention makes a difference here.
    """
    kernels = kernels_of(operation)
    if backend not in kernels:
        names = ", ".join(member.value for member in kernels)
        return f"{operation} has no {backend.value} kernel; it has {names}"
    if kernels[backend].asks:
        return _asked_reason(kernels[backend].module, kernels[backend].devices, device, dtype)
    if backend is Backend.NATIVE:
        if device is not None and device.type != "cpu":
            return f"the native kernels take CPU tensors, these are on {device}"
        return native.reason("cpu")
    if backend in TRITON_BACKENDS:
        return _triton_reason(backend, device)
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


def _asked_reason(
    module: str, devices: tuple[str, ...], device: torch.device | None, dtype: torch.dtype | None
) -> str | None:
    """What the module of a kernel says itself."""
    import torch

    if device is not None and device.type not in devices:
        return f"its kernels take tensors on {' or '.join(devices)}, these are on {device}"
    try:
        asked = importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported: {error}"
    return asked.reason(torch.device("cpu") if device is None else device, torch.float32 if dtype is None else dtype)


def _triton_reason(backend: Backend, device: torch.device | None) -> str | None:
    import torch

    try:
        language = importlib.import_module("triton.language")
    except ImportError as error:
        return f"triton cannot be imported: {error} (pip install triton; Linux only)"
    if backend is Backend.TRITON_SPECIALISED and not hasattr(language, "make_tensor_descriptor"):
        return "the installed Triton has no tensor descriptors (3.4 has)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # kernels run on CPU tensors, slowly: for tests
    if device is not None and device.type != "cuda":
        return f"Triton kernels take tensors on a GPU, these are on {device}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    return None
