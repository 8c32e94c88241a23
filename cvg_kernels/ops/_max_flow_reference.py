"""Exact maximum flow by the reference, as a backend; as `_max_flow_native`."""

from __future__ import annotations

import torch

from cvg_kernels.reference import max_flow as reference


def subgraph_forward(cross, temporal, residual, sink):
    """Returns flow, cut and whether all input was capacities; see `cvg_kernels.reference.max_flow`."""
    if not are_capacities(cross, *temporal):
        return None, None, False
    flow, cut = reference.subgraph_max_flow(cross, temporal, residual=residual, sink=sink)
    return flow.contiguous(), cut.contiguous(), True


def subgraph_backward(grad_flow, cut, residual, sink, need_cross, need_temporal):
    """Returns the gradients asked for, the others `None`."""
    cross, temporal = reference.subgraph_gradients(grad_flow, cut, residual, sink)
    hops = zip(temporal, need_temporal, strict=True)
    return (cross.contiguous() if need_cross else None, [hop.contiguous() if need else None for hop, need in hops])


def forward(capacity, source, sink):
    """Returns flow, source's side and whether all input was capacities."""
    if not are_capacities(capacity):
        return None, None, False
    return *reference.max_flow(capacity, source, sink), True


def are_capacities(*tensors: torch.Tensor) -> bool:
    """Whether all numbers are finite and not negative: the algorithm would not end with others."""
    return all(bool(((tensor >= 0) & (tensor < torch.inf)).all()) for tensor in tensors)
