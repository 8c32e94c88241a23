"""Min-max flow by the reference, as a backend: its gradients come from torch, below the operation."""

from __future__ import annotations

import torch

from python_ref import path_flow as reference


def path_flow(cross, temporal, temperature, residual):
    """See `python_ref.path_flow.path_flow`."""
    flow = reference.path_flow(cross, temporal, temperature=temperature, residual=residual)
    return cross.clone() if flow is cross else flow.contiguous()


def path_flow_backward(grad, cross, temporal, temperature, residual, need_temporal):
    """The gradient of cross, and that of each hop or `None`."""

    def flow(cross, *hops):
        return reference.path_flow(cross, hops, temperature=temperature, residual=residual)

    pull_back = torch.func.vjp(flow, cross, *temporal)[1]
    grad_cross, *grads = pull_back(grad)
    hops = [hop.contiguous() if need else None for hop, need in zip(grads, need_temporal, strict=True)]
    return grad_cross.contiguous() if temporal else grad_cross.clone(), hops


def min_max_matmul(a, b, temperature):
    """See `python_ref.path_flow.min_max_matmul`."""
    return reference.min_max_matmul(a, b, temperature).contiguous()


def min_max_matmul_backward(grad, a, b, temperature, need_a, need_b):
    """The gradients of a and b, `None` where not needed."""
    pull_back = torch.func.vjp(lambda a, b: reference.min_max_matmul(a, b, temperature), a, b)[1]
    grads = zip(pull_back(grad), (need_a, need_b), strict=True)
    return [found.contiguous() if need else None for found, need in grads]
