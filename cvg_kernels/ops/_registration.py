"""What the registrations of operations with torch have in common."""

from __future__ import annotations

import torch

from cvg_kernels.backends import Backend, require

#: Devices whose tensors go through the registered operations; `auto` serves any other with the reference.
KERNEL_DEVICES = ("cpu", "cuda", "meta")


def backend_on(operation: str, backend: Backend, device: torch.device) -> Backend:
    """The backend of a call, where `auto` is the reference on devices that no kernel is registered for.

    Raises:
        BackendUnavailableError: if a named backend has nothing for the device.
    """
    if device.type in KERNEL_DEVICES or backend is Backend.REFERENCE:
        return backend
    if backend is not Backend.AUTO:
        require(operation, backend, device)
    return Backend.REFERENCE


def forbid_double_backward(operation: str) -> None:
    """Registers a formula for the gradient of `cvg_kernels::<operation>_backward`: an error that says what to do."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{operation} has no second derivative in its kernels; call it with backend='reference', which is plain "
            "PyTorch and can be differentiated twice"
        )

    torch.library.register_autograd(f"cvg_kernels::{operation}_backward", refuse)
