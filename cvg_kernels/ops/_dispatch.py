"""Which backend serves a call of attention with capture, or of temporal attention."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from cvg_kernels.backends import Backend, require, unavailable_reason
from cvg_kernels.errors import ArgumentError

#: Devices whose tensors go through the registered operation; `auto` serves any other with the reference.
KERNEL_DEVICES = ("cpu", "cuda", "meta")
_NO_FLOAT64 = (
    "query of dtype torch.float64 is not served by backend 'triton'; it takes float32, bfloat16 and float16 (use "
    "'native' on the CPU, or 'reference')"
)


def choose_attention_backend(
    device_type: str, dtype: torch.dtype, usable: Callable[[Backend], bool]
) -> Backend:
    """What `auto` means, a function of its arguments alone: the fastest backend that can, by our benchmarks.

    Args:
        device_type: of the tensors: `"cpu"`, `"cuda"`, ….
        dtype: of the query.
        usable: tells whether a backend can run here.
    """
    preferred = {"cpu": Backend.NATIVE, "cuda": Backend.TRITON}.get(device_type)
    if preferred is Backend.TRITON and dtype == torch.float64:
        return Backend.REFERENCE  # no Triton kernel computes in float64
    return preferred if preferred is not None and usable(preferred) else Backend.REFERENCE


def attention_module(backend: Backend, query: torch.Tensor) -> tuple[Backend, ModuleType]:
    """The backend that serves a call, and the module with its `forward` and `backward`.

    Args:
        backend: as the user named it.
        query: of the call; its device and dtype decide.

    Raises:
        BackendUnavailableError: if a named backend cannot run here.
        ArgumentError: if it has no kernel for the dtype.
    """
    if backend is Backend.AUTO:
        device = query.device
        backend = choose_attention_backend(
            device.type,
            query.dtype,
            lambda candidate: unavailable_reason("attention", candidate, device) is None,
        )
    else:
        require("attention", backend, query.device)
    if backend is Backend.TRITON and query.dtype == torch.float64:
        raise ArgumentError(_NO_FLOAT64)
    if backend is Backend.NATIVE:
        from cvg_kernels.ops import _attention_native as module
    elif backend is Backend.TRITON:
        from cvg_kernels._triton import attention as module
    else:
        from cvg_kernels.ops import _attention_reference as module
    return backend, module


def _triton_temporal_refusal(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """What of a call of temporal attention the Triton kernels do not hold in registers, or `None`."""
    if query.dtype == torch.float64:
        return _NO_FLOAT64
    most = {"frames": 32 if query.dtype == torch.float32 else 128, "head_dim": 128}
    sizes = {"frames": query.shape[-2], "head_dim": max(query.shape[-1], value.shape[-1])}
    for name, size in sizes.items():
        if size > most[name]:
            return (
                f"query or value with {name} {size} is not served by backend 'triton', which takes up to {most[name]} "
                f"in {query.dtype} (the reference takes any)"
            )
    return None


def temporal_attention_module(
    backend: Backend, query: torch.Tensor, value: torch.Tensor
) -> tuple[Backend, ModuleType]:
    """The backend that serves a call of temporal attention, and the module with its `forward` and `backward`.

    Args:
        backend: as the user named it.
        query: `[B, P, H, F, D]` of the call.
        value: `[B, P, H, F, Dv]` of the call.

    Raises:
        BackendUnavailableError: if a named backend cannot run here.
        ArgumentError: if it has no kernel for the dtype or the sizes.
    """

    def usable(candidate: Backend) -> bool:
        if candidate is Backend.TRITON and _triton_temporal_refusal(query, value):
            return False
        return unavailable_reason("temporal_attention", candidate, query.device) is None

    if backend is Backend.AUTO:
        backend = choose_attention_backend(query.device.type, query.dtype, usable)
    else:
        require("temporal_attention", backend, query.device)
    refusal = _triton_temporal_refusal(query, value) if backend is Backend.TRITON else None
    if refusal is not None:
        raise ArgumentError(refusal)
    if backend is Backend.NATIVE:
        from cvg_kernels.ops import _temporal_attention_native as module
    elif backend is Backend.TRITON:
        from cvg_kernels._triton import temporal_attention as module
    else:
        from cvg_kernels.ops import _temporal_attention_reference as module
    return backend, module
