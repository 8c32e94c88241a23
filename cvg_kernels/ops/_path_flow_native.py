"""Min-max flow by the C++ kernels: allocates the results and passes addresses."""

from __future__ import annotations

import torch

from cvg_kernels import native
from cvg_kernels.ops._native_call import DTYPE_CODES, address, strided

#: residual → (factor of the hop, what the diagonal gains)
_MIXING = {"average": (0.5, 0.5), "add": (1.0, 1.0), None: (1.0, 0.0)}


def _call(cross, temporal, temperature, residual) -> tuple:
    batch, tokens, frames, positions = cross.shape
    return (
        (batch, tokens, frames, positions),
        DTYPE_CODES[cross.dtype],
        strided(cross),
        [strided(hop) for hop in temporal],
        *_MIXING[residual],
        temperature or 0.0,
        torch.get_num_threads(),
    )


def path_flow(cross, temporal, temperature, residual):
    """See `python_ref.path_flow.path_flow`."""
    flow = torch.empty_like(cross, memory_format=torch.contiguous_format)
    native.load("cpu").path_flow(*_call(cross, temporal, temperature, residual), flow.data_ptr())
    return flow


def path_flow_backward(grad, cross, temporal, temperature, residual, need_temporal):
    """The gradient of cross, and that of each hop or `None`."""
    grad_cross = torch.empty_like(cross, memory_format=torch.contiguous_format)
    grad_temporal = [
        torch.empty_like(hop, memory_format=torch.contiguous_format) if need else None
        for hop, need in zip(temporal, need_temporal, strict=True)
    ]
    native.load("cpu").path_flow_backward(
        *_call(cross, temporal, temperature, residual),
        strided(grad),
        grad_cross.data_ptr(),
        [address(hop) for hop in grad_temporal],
    )
    return grad_cross, grad_temporal


def _product_call(a, b, temperature) -> tuple:
    batch, rows, depth = a.shape
    return (
        (batch, rows, depth, b.shape[2]),
        DTYPE_CODES[a.dtype],
        strided(a),
        strided(b),
        temperature or 0.0,
        torch.get_num_threads(),
    )


def min_max_matmul(a, b, temperature):
    """See `python_ref.path_flow.min_max_matmul`."""
    c = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    native.load("cpu").min_max(*_product_call(a, b, temperature), c.data_ptr())
    return c


def min_max_matmul_backward(grad, a, b, temperature, need_a, need_b):
    """The gradients of a and b, `None` where not needed."""
    grad = grad.contiguous()
    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else None
        for tensor, need in ((a, need_a), (b, need_b))
    ]
    native.load("cpu").min_max_backward(
        *_product_call(a, b, temperature), grad.data_ptr(), address(grads[0]), address(grads[1])
    )
    return grads
