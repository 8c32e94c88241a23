"""Exact maximum flow against OR-tools, one thread each, on graphs of softmax attention with two hops.

A graph leads from one token through the cross-attention map and two temporal hops, skip connections averaged in, to
one frame, or to the video. OR-tools is given what it wants: integers, and arcs prebuilt as arrays, of which only the
capacities change from graph to graph. Its time is that of making the graph and solving it; ours is that of the public
operation, tensors in and flow and cut out. A wrong result is not timed: every flow of ours must be that of OR-tools,
to the last bit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from cvg_kernels.bench.harness import OURS, median_seconds
from cvg_kernels.ops import subgraph_max_flow

KIND, ROUNDS = "cases", {"cpu": 7, "gpu": 7}
HOPS = 2
TOKENS = 8
FRAMES = (16, 21, 32, 64)
SHARPNESS = {"flat": 1.0, "peaked": 3.0}  # standard deviation of the logits
GRID = 2**24
PEER = "OR-tools"


def attention(
    frames: int, positions: int, sharpness: float, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Cross `[1, K, F, L]`, softmax over tokens, and hops `[1, L, F, F]`, softmax over frames.

    They are rounded to multiples of 2⁻²⁴, so that an integer solver can take them.
    """
    cross = torch.randn(1, TOKENS, frames, positions).mul(sharpness).softmax(1)
    hops = torch.randn(HOPS, 1, positions, frames, frames).mul(sharpness).softmax(-1)
    cross, *hops = (map_.mul(GRID).round().div(GRID).to(dtype) for map_ in (cross, *hops))
    return cross, hops


def arcs_of(frames: int, hops: int, sink: str) -> tuple[np.ndarray, np.ndarray]:
    """Tails and heads: token 0, node (h, f) 1 + h·F + f, and the last one the sink."""
    each = np.arange(frames)
    layers = hops + 1 if sink == "video" else max(hops, 1)
    drain = 1 + layers * frames
    tails, heads = [np.zeros(frames)], [1 + each]
    for h in range(layers - 1):
        tails.append(1 + h * frames + np.repeat(each, frames))
        heads.append(1 + (h + 1) * frames + np.tile(each, frames))
    tails.append(1 + (layers - 1) * frames + each)
    heads.append(np.full(frames, drain))
    return np.concatenate(tails).astype(np.int32), np.concatenate(heads).astype(np.int32)


def capacities_of(
    cross: torch.Tensor, temporal: Sequence[torch.Tensor], residual: str | None, sink: str
) -> tuple[np.ndarray, int]:
    """Integer capacities `[graphs, arcs]` in the order of `arcs_of`, and how many make 1;
    graphs are (b, k, l, frame).
    """
    scale = 2 * GRID  # halves of the grid, where the skip connection is averaged
    batch, tokens, frames, positions = cross.shape
    sinks = frames if sink == "frame" else 1
    graphs = (batch, tokens, positions, sinks)
    hops = []
    for hop in temporal:
        mixed = hop.double() + (0 if residual is None else torch.eye(frames, device=hop.device))
        mixed = mixed / 2 if residual == "average" else mixed
        hops.append(mixed.mT[:, None])  # [B, 1, L, tail, head]
    parts = [cross.double().permute(0, 1, 3, 2)[:, :, :, None].expand(*graphs, -1)]
    if sink == "frame":
        last = (
            hops.pop().mT
            if hops
            else cross.double().permute(0, 1, 3, 2)[..., None].mul(torch.eye(frames, device=cross.device))
        )  # [B, ·, L, frame, node]
    else:
        last = cross.new_ones(1, 1, 1, 1, frames, dtype=torch.float64)
    parts += [hop.flatten(-2)[:, :, :, None].expand(*graphs, -1) for hop in hops]
    parts.append(last.expand(*graphs, -1))
    return (torch.cat(parts, -1).flatten(0, 3) * scale).long().cpu().numpy(), scale


def ortools_flows(arcs: tuple[np.ndarray, np.ndarray], capacities: np.ndarray) -> list[int]:
    """Flow of every graph by OR-tools' solver."""
    from ortools.graph.python.max_flow import SimpleMaxFlow

    tails, heads = arcs
    drain = int(heads[-1])
    flows = []
    for capacity in capacities:
        solver = SimpleMaxFlow()
        solver.add_arcs_with_capacity(tails, heads, capacity)
        solver.solve(0, drain)
        flows.append(solver.optimal_flow())
    return flows


class Case(NamedTuple):
    """About so many graphs of some frames, to a sink, with attention of some sharpness."""

    frames: int
    sink: str
    kind: str
    graphs: int


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All combinations; quick: few graphs."""
    return [
        Case(frames, sink, kind, 64 if quick else 4096)
        for frames in (FRAMES[:1] if quick else FRAMES)
        for sink in ("frame", "video")
        for kind in SHARPNESS
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """OR-tools has one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def measure(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of both solvers for the graphs; of ours alone where OR-tools is not installed.

    Raises:
        AssertionError: if the flows differ.
    """
    frames, sink, kind, graphs = case
    per_position = TOKENS * (frames if sink == "frame" else 1)
    positions = max(1, graphs // per_position)
    cross, hops = attention(frames, positions, SHARPNESS[kind], dtype)
    arcs = arcs_of(frames, HOPS, sink)
    capacities, scale = capacities_of(cross, hops, "average", sink)
    cross, hops = cross.to(device), [hop.to(device) for hop in hops]

    def ours():
        return subgraph_max_flow(cross, hops, sink=sink)

    flow, cut = ours()
    arms = {OURS: ours}
    if importlib.util.find_spec("ortools") is not None:
        arms = {PEER: lambda: ortools_flows(arcs, capacities)} | arms
        flow = flow.mT if sink == "frame" else flow  # the order of the capacities
        wanted = torch.tensor(ortools_flows(arcs, capacities), dtype=torch.float64) / scale
        differing = int((flow.cpu().flatten() != wanted.to(dtype)).sum())
        assert differing == 0, f"{differing} of {len(capacities)} flows differ from {PEER}'s"
    times = median_seconds(arms, device, rounds)
    return {
        "frames": frames,
        "sink": sink,
        "kind": kind,
        "sharpness": SHARPNESS[kind],
        "graphs": len(capacities),
        "arcs": len(arcs[0]),
        # At the source all of the token's edges are cut: solved by every greedy start.
        "cut_at_source": (~cut[..., 0, :]).all(-1).double().mean().item(),
        "seconds": times,
    }


def show(case: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints one line."""
    if len(report[KIND]) == 1:
        print(f"{'':30}  {PEER:>12}  {OURS:>12}  graphs per second, one CPU thread")
    per_second = {name: case["graphs"] / seconds for name, seconds in case["seconds"].items()}
    peer, ours = per_second.get(PEER, float("nan")), per_second[OURS]
    name = f"{case['frames']} frames to {case['sink']}, {case['kind']}"
    trivial = f"{case['cut_at_source']:.0%} cut at the token"
    print(f"{name:30}  {peer:12.0f}  {ours:12.0f}  {ours / peer:6.1f}×  {trivial}")
