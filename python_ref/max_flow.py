"""Exact maximum flow of small graphs, its minimum cut, and its gradient. The definition.

By the max-flow min-cut theorem the flow is the capacity of the minimum cut, so it is linear in the capacities as long
as the cut stays: the gradient is 1 on the edges of the cut and 0 elsewhere. Where several cuts are minimal, the one
with the fewest nodes on the source's side counts: what can still be reached from the source once the flow is maximal.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import torch
from cvg_kernels.reference.path_flow import residual_hop


def source_side(capacity: list[list[float]], source: int, sink: int) -> list[bool]:
    """Which nodes lie on the source's side of the minimum cut, by Edmonds and Karp's algorithm.

    Ends with floats as well: each augmentation sets the room of at least one edge to exactly 0 (x − x), and the
    distance at which an edge is used can only grow.

    Args:
        capacity: `[n][n]`, row = tail.
        source: a node.
        sink: another.
    """
    room = [list(row) for row in capacity]
    nodes = range(len(room))
    near = [[v for v in nodes if v != u and (room[u][v] > 0 or room[v][u] > 0)] for u in nodes]
    while True:
        parent = {source: source}
        queue = deque([source])
        while queue and sink not in parent:
            u = queue.popleft()
            for v in near[u]:
                if v not in parent and room[u][v] > 0:
                    parent[v] = u
                    queue.append(v)
        if sink not in parent:
            return [node in parent for node in nodes]
        path = [sink]
        while path[-1] != source:
            path.append(parent[path[-1]])
        edges = [(u, v) for v, u in itertools.pairwise(path)]
        amount = min(room[u][v] for u, v in edges)
        for u, v in edges:
            room[u][v] -= amount
            room[v][u] += amount


def max_flow(capacity: torch.Tensor, source: int, sink: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow `[G]` and source's side of the minimum cut, bool `[G, n]`, of graphs `[G, n, n]` (row = tail)."""
    graphs, nodes, _ = capacity.shape
    sides = [source_side(graph, source, sink) for graph in capacity.detach().double().tolist()]
    side = torch.tensor(sides, dtype=torch.bool, device=capacity.device).reshape(graphs, nodes)
    cut = side[:, :, None] & ~side[:, None, :]
    flow = torch.where(cut, capacity, 0).sum((1, 2), dtype=torch.float64)
    return flow.to(capacity.dtype), side


def subgraph_max_flow(
    cross: torch.Tensor, temporal: Sequence[torch.Tensor], *, residual: str | None = "average", sink: str = "video"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum flow of each token through the temporal hops, at each position.

    Node (h, f) is frame f after h hops. The token feeds (0, f) with capacity cross[b, k, f, l], and (h, j) feeds
    (h + 1, i) with the capacity residual_hop(T_h)[i, j]. Arithmetic is float64 whatever the input.

    Args:
        cross: `[B, K, F, L]`.
        temporal: n hops `[B, L, F, F]` in the order in which the network applies them, row = attending frame.
        residual: as for `residual_hop`.
        sink: `"video"`: every (n, f) feeds one sink with capacity 1. `"frame"`: each (n, f) is the sink of a graph of
            its own, in which the other output frames lead nowhere.

    Returns:
        The flow, `[B, K, L]` or `[B, K, F, L]`, and the cut: whether each node (h, f) is on the source's side,
        `[B, K, L, n + 1, F]` or `[B, K, L, F, n + 1, F]`. Output frames that lead nowhere count to that side.
    """
    hops = [residual_hop(hop.double(), residual) for hop in temporal]
    batch, tokens, frames, positions = cross.shape
    sinks = frames if sink == "frame" else 1
    sides = [
        _side_of_subgraph(
            cross[b, k, :, place].detach().tolist(),
            [hop[b, place].detach().tolist() for hop in hops],
            frame if sink == "frame" else None,
        )
        for b, k, place, frame in itertools.product(range(batch), range(tokens), range(positions), range(sinks))
    ]
    cut = torch.tensor(sides, dtype=torch.bool, device=cross.device)
    cut = cut.reshape(batch, tokens, positions, sinks, len(hops) + 1, frames)
    flow = _capacity_of_cut(cross.double(), hops, cut, sink).to(cross.dtype)  # [B, K, L, sinks]
    return (flow.mT, cut) if sink == "frame" else (flow[..., 0], cut[..., 0, :, :])


def _side_of_subgraph(cross: list[float], hops: list[list[list[float]]], frame: int | None) -> list[list[bool]]:
    """The cut of one graph, `[hops + 1][F]`; `frame` is the sink, or `None` for all frames together."""
    frames, layers = len(cross), len(hops) + 1
    source, drain = layers * frames, layers * frames + 1
    capacity = [[0.0] * (drain + 1) for _ in range(drain + 1)]
    capacity[source][:frames] = cross
    for h, hop in enumerate(hops):
        for i, j in itertools.product(range(frames), repeat=2):
            capacity[h * frames + j][(h + 1) * frames + i] = hop[i][j]
    outputs = range((layers - 1) * frames, layers * frames)
    for node in outputs:
        capacity[node][drain] = 1.0
    side = source_side(capacity, source, drain if frame is None else outputs[frame])
    if frame is not None:
        side = [reached or node in outputs for node, reached in enumerate(side)]
        side[outputs[frame]] = False
    return [side[h * frames : (h + 1) * frames] for h in range(layers)]


def _capacity_of_cut(cross, hops, cut, sink):
    """Capacity of the edges of each cut, `[B, K, L, sinks]`, differentiable in cross and hops."""
    far = ~cut  # [B, K, L, sinks, hops + 1, F]
    total = torch.where(far[..., 0, :], cross.transpose(2, 3)[:, :, :, None], 0).sum(-1)
    for h, hop in enumerate(hops):
        edges = far[..., h + 1, :, None] & cut[..., h, None, :]  # row = head, as in the hop
        total = total + torch.where(edges, hop[:, None, :, None], 0).sum((-1, -2))
    return total if sink == "frame" else total + cut[..., -1, :].sum(-1)


def subgraph_gradients(
    grad_flow: torch.Tensor, cut: torch.Tensor, residual: str | None, sink: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of cross and of each hop, from that of the flow and the cut alone."""
    if sink == "frame":
        grad = grad_flow.mT  # [B, K, L, sinks]
    else:
        grad, cut = grad_flow[..., None], cut[..., None, :, :]
    near, far = cut.to(grad.dtype), (~cut).to(grad.dtype)
    grad_cross = torch.einsum("bkls,bklsf->bkfl", grad, far[..., 0, :])
    grad_hops = [
        torch.einsum("bkls,bklsi,bklsj->blij", grad, far[..., h + 1, :], near[..., h, :])
        for h in range(cut.shape[-2] - 1)
    ]
    return grad_cross, [hop / 2 if residual == "average" else hop for hop in grad_hops]
