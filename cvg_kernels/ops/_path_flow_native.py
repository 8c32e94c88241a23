"""Min-max path flow by the C++ kernels: allocates the results and passes addresses."""

from __future__ import annotations

import torch

from cvg_kernels import native
from cvg_kernels.ops._native_call import DTYPE_CODES, address, strided, threads

#: residual → (hop_weight, skip_weight)
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
        threads(),
    )


def forward(cross, temporal, temperature, residual):
    """See `cvg_kernels.reference.path_flow`."""
    flow = torch.empty_like(cross, memory_format=torch.contiguous_format)
    native.load("cpu").path_flow(*_call(cross, temporal, temperature, residual), flow.data_ptr())
    return flow


def backward(grad, cross, temporal, temperature, residual, need_temporal):
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
