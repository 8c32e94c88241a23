"""The min-max product by the C++ kernel: allocates the results and passes addresses."""

from __future__ import annotations

import torch

from cvg_kernels import native
from cvg_kernels.ops._native_call import DTYPE_CODES, address, strided, threads


def _call(a, b, temperature) -> tuple:
    batch, rows, depth = a.shape
    return (
        (batch, rows, depth, b.shape[2]),
        DTYPE_CODES[a.dtype],
        strided(a),
        strided(b),
        temperature or 0.0,
        threads(),
    )


def forward(a, b, temperature):
    """See `cvg_kernels.reference.min_max_matmul`."""
    c = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    native.load("cpu").min_max_matmul(*_call(a, b, temperature), c.data_ptr())
    return c


def backward(grad, a, b, temperature, need_a, need_b):
    """The gradients of a and b, `None` where not needed."""
    grad = grad.contiguous()
    grads = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else None
        for tensor, need in ((a, need_a), (b, need_b))
    ]
    native.load("cpu").min_max_matmul_backward(
        *_call(a, b, temperature), grad.data_ptr(), address(grads[0]), address(grads[1])
    )
    return grads
