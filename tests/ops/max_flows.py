"""Maximum flows that are always held against the capacity of their cuts, and graphs to try them on."""

from __future__ import annotations

import torch

import cvg_kernels as cvg
from tests.ops.backends import backends, device_of

EPS = torch.finfo(torch.float64).eps

BACKENDS = backends("max_flow")

FAST = backends("max_flow", "native", "cuda")


def on(backend: str, *tensors: torch.Tensor):
    moved = [tensor.to(device_of(backend)) for tensor in tensors]
    return moved[0] if len(moved) == 1 else moved


def max_flow(capacity, source=0, sink=1, backend="native"):
    """The operation, its flow always held against the capacity of its cut."""
    with cvg.trace_backends() as ran:
        flow, side = cvg.max_flow(on(backend, capacity), source, sink, backend=backend)
    assert ran == [("max_flow", backend)]
    flow, side = flow.cpu(), side.cpu()
    assert side[:, source].all() and not side[:, sink].any()
    cut = side[:, :, None] & ~side[:, None, :]
    value = torch.where(cut, capacity.double(), 0).sum((1, 2))
    torch.testing.assert_close(flow.double(), value, rtol=rounding(capacity), atol=0)
    return flow, side


def subgraph_max_flow(cross, temporal, residual="average", sink="video", backend="native"):
    """The same for graphs of attention; the capacity of the cut is computed from the contract, edge by edge."""
    with cvg.trace_backends() as ran:
        flow, cut = cvg.subgraph_max_flow(
            on(backend, cross), [on(backend, hop) for hop in temporal], residual=residual, sink=sink, backend=backend
        )
    assert ran == [("max_flow", backend)]
    flow, cut = flow.cpu(), cut.cpu()
    graphs = flow.mT if sink == "frame" else flow[..., None]  # [B, K, L, sinks]
    sides = cut if sink == "frame" else cut[..., None, :, :]
    assert graphs.dtype == cross.dtype and sides.shape == (*graphs.shape, len(temporal) + 1, cross.shape[2])
    token = cross.double().permute(0, 1, 3, 2)[:, :, :, None]  # [B, K, L, 1, F]
    value = torch.where(sides[..., 0, :], 0, token).sum(-1)
    for h, hop in enumerate(temporal):
        room = hop.double() + (residual is not None) * torch.eye(hop.shape[-1])
        room = room / (2 if residual == "average" else 1)
        severed = sides[..., h, None, :] & ~sides[..., h + 1, :, None]
        value = value + torch.where(severed, room[:, None, :, None], 0).sum((-1, -2))
    if sink == "video":
        value = value + sides[..., -1, :].sum(-1)
    else:
        own = torch.eye(cross.shape[2], dtype=torch.bool)
        assert torch.equal(sides[..., -1, :], ~own.expand_as(sides[..., -1, :]))
    torch.testing.assert_close(graphs.double(), value, rtol=rounding(cross), atol=0)
    return flow, cut


def rounding(capacity: torch.Tensor) -> float:
    """Of the result once, and of sums inside."""
    return torch.finfo(capacity.dtype).eps + 1000 * EPS


def attention_graphs(batch=1, tokens=3, frames=5, positions=2, hops=2, dtype=torch.float64, sharp=2.0):
    """Cross-attention and temporal attention as softmax makes them; few tokens, so that cuts are not trivial."""
    cross = (sharp * torch.randn(batch, tokens, frames, positions, dtype=dtype)).softmax(1)
    hops = sharp * torch.randn(hops, batch, positions, frames, frames, dtype=dtype)
    return cross, list(hops.softmax(-1).unbind(0))
