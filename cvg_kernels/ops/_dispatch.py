"""Which backend serves a call: by our benchmarks, or as the user names it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from cvg_kernels.backends import (
    OPERATIONS,
    Backend,
    parse_backend,
    require,
    unavailable_reason,
)
from cvg_kernels.errors import ArgumentError

#: Devices whose tensors go through the registered operations; `auto` serves any other with the reference.
KERNEL_DEVICES = ("cpu", "cuda", "meta")

_HALVES = (torch.bfloat16, torch.float16)
_WIDE = (torch.float32, torch.float64)

#: What a backend's kernels compute in; the reference takes every floating point type.
_DTYPES: dict[tuple[str, Backend], tuple[torch.dtype, ...]] = {
    ("attention", Backend.NATIVE): (*_WIDE, *_HALVES),
    ("attention", Backend.TRITON): (torch.float32, *_HALVES),
    ("temporal_attention", Backend.NATIVE): (*_WIDE, *_HALVES),
    ("temporal_attention", Backend.TRITON): (torch.float32, *_HALVES),
    ("temporal_attention", Backend.CUDA): _HALVES,
    ("frame_band_attention", Backend.NATIVE): (*_WIDE, *_HALVES),
    ("frame_band_attention", Backend.TRITON): (torch.float32, *_HALVES),
    ("guidance_mix", Backend.NATIVE): (*_WIDE, *_HALVES),
    ("guidance_mix", Backend.TRITON): (torch.float32, *_HALVES),
    ("max_flow", Backend.NATIVE): _WIDE,
    ("max_flow", Backend.CUDA): _WIDE,
    ("coupled_flow", Backend.NATIVE): _WIDE,
    ("path_flow", Backend.NATIVE): _WIDE,
    ("path_flow", Backend.TRITON): (torch.float32,),
    ("token_peaks", Backend.NATIVE): _WIDE,
    ("token_peaks", Backend.TRITON): (torch.float32,),
}

#: The kernels of a device, that of choice first.
_PREFERRED = {"cpu": (Backend.NATIVE,), "cuda": (Backend.TRITON, Backend.CUDA)}


def choose_backend(
    operation: str, device_type: str, dtype: torch.dtype, usable: Callable[[Backend], bool]
) -> Backend:
    """What `auto` means, a function of its arguments alone.

    Args:
        operation: a key of `backends.OPERATIONS`.
        device_type: of the tensors: `"cpu"`, `"cuda"`, ….
        dtype: of the tensors.
        usable: tells whether a backend can run here.
    """
    there = [one for one in _PREFERRED.get(device_type, ()) if one in OPERATIONS[operation]]
    if there and dtype in _DTYPES[operation, there[0]] and usable(there[0]):
        return there[0]
    return Backend.REFERENCE


def backend_for(operation: str, backend: str | Backend, tensor: torch.Tensor) -> Backend:
    """The backend that serves a call; decided once where the call is compiled.

    Args:
        operation: a key of `backends.OPERATIONS`.
        backend: as the user named it.
        tensor: of the call; its device and dtype decide.

    Raises:
        ArgumentError: for a name that is none, or a named backend without a kernel for the dtype.
        BackendUnavailableError: if a named backend cannot run here.
    """
    name = parse_backend(backend).value
    return Backend(_decide(operation, name, tensor.device.type, tensor.dtype))


def _decide(operation: str, name: str, device_type: str, dtype: torch.dtype) -> str:
    backend, device = Backend(name), torch.device(device_type)
    if backend is Backend.AUTO:
        return choose_backend(
            operation,
            device_type,
            dtype,
            lambda candidate: unavailable_reason(operation, candidate, device) is None,
        ).value
    require(operation, backend, device)
    accepted = _DTYPES.get((operation, backend), (dtype,))
    if dtype not in accepted:
        names = ", ".join(str(one) for one in accepted)
        raise ArgumentError(
            f"{operation} in dtype {dtype} is not served by backend {name!r}; it takes {names} (the reference "
            "takes any)"
        )
    return name


# What `torch.compiler.assume_constant_result` does, without its import of the whole compiler, which takes a second.
_decide._dynamo_marked_constant = True


def attention_module(backend: Backend, query: torch.Tensor) -> tuple[Backend, ModuleType]:
    """The backend that serves a call of attention, and the module with its `forward` and `backward`.

    Args:
        backend: as the user named it.
        query: of the call; its device and dtype decide.

    Raises:
        BackendUnavailableError: if a named backend cannot run here.
        ArgumentError: if it has no kernel for the dtype.
    """
    backend = backend_for("attention", backend, query)
    if backend is Backend.NATIVE:
        from cvg_kernels.ops import _attention_native as module
    elif backend is Backend.TRITON:
        from cvg_kernels._triton import attention as module
    else:
        from cvg_kernels.ops import _attention_reference as module
    return backend, module


def _temporal_refusal(backend: Backend, query: torch.Tensor, value: torch.Tensor) -> str | None:
    """What of a call of temporal attention the GPU kernels do not hold in registers, or `None`."""
    if backend is Backend.TRITON:
        served = {"frames": (1, 32 if query.dtype == torch.float32 else 128), "head_dim": (1, 128)}
    elif backend is Backend.CUDA:
        served = {"frames": (16, 128), "head_dim": (1, 160)}
    else:
        return None
    sizes = {"frames": query.shape[-2], "head_dim": max(query.shape[-1], value.shape[-1])}
    for name, size in sizes.items():
        least, most = served[name]
        if not least <= size <= most:
            return (
                f"query or value with {name} {size} is not served by backend {backend.value!r}, which takes {least} to "
                f"{most} in {query.dtype} (the reference takes any)"
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
    chosen = backend_for("temporal_attention", backend, query)
    refusal = _temporal_refusal(chosen, query, value)
    if refusal is not None:
        if backend is not Backend.AUTO:
            raise ArgumentError(refusal)
        chosen = Backend.REFERENCE
    if chosen in (Backend.NATIVE, Backend.CUDA):
        from cvg_kernels.ops import _temporal_attention_native as module
    elif chosen is Backend.TRITON:
        from cvg_kernels._triton import temporal_attention as module
    else:
        from cvg_kernels.ops import _temporal_attention_reference as module
    return chosen, module


def refuse_second_derivative(operation: str) -> None:
    """Registers a formula for the gradient of `cvg_kernels::<operation>_backward`: an error that says what to do."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{operation} has no second derivative in its kernels; call it with backend='reference', which is plain "
            "PyTorch and can be differentiated twice"
        )

    torch.library.register_autograd(f"cvg_kernels::{operation}_backward", refuse)
