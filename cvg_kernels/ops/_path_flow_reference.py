"""Min-max path flow by the reference, as a backend: its gradients come from torch, below the operation."""

from __future__ import annotations

import torch

from cvg_kernels.reference import path_flow as reference


def forward(cross, temporal, temperature, residual):
    """See `cvg_kernels.reference.path_flow`."""
    flow = reference.path_flow(cross, temporal, temperature=temperature, residual=residual)
    return cross.clone() if flow is cross else flow.contiguous()


def backward(grad, cross, temporal, temperature, residual, need_temporal):
    """The gradient of cross, and that of each hop or `None`."""

    def flow(cross, *hops):
        return reference.path_flow(cross, hops, temperature=temperature, residual=residual)

    vjp = torch.func.vjp(flow, cross, *temporal)[1]
    grad_cross, *grads = vjp(grad)
    hops = [hop.contiguous() if need else None for hop, need in zip(grads, need_temporal, strict=True)]
    return grad_cross.contiguous() if temporal else grad_cross.clone(), hops
