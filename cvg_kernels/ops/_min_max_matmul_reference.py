"""The min-max product by the reference, as a backend: its gradients come from torch, below the operation."""

from __future__ import annotations

import torch

from cvg_kernels.reference import min_max_matmul as reference


def forward(a, b, temperature):
    """See `cvg_kernels.reference.min_max_matmul`."""
    return reference.min_max_matmul(a, b, temperature).contiguous()


def backward(grad, a, b, temperature, need_a, need_b):
    """The gradients of a and b, `None` where not needed."""
    vjp = torch.func.vjp(lambda a, b: reference.min_max_matmul(a, b, temperature), a, b)[1]
    grads = zip(vjp(grad), (need_a, need_b), strict=True)
    return [found.contiguous() if need else None for found, need in grads]
