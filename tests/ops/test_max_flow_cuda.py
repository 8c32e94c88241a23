"""The very code of the CUDA solver of maximum flow on the CPU: blocks of warps of 32 lanes, in any order, under watch.

The oracle is the definition for small graphs, and the solver for CPUs, which other tests hold against other people's;
it walks the same way, so that large graphs have the same numbers to the bit.
"""

from __future__ import annotations

import pytest
import torch

from cvg_kernels.ops import _max_flow_native as native
from cvg_kernels.reference import max_flow as reference

KIB = 1024
#: Processors, bytes of shared memory of a block and of a processor. The last has none to speak of.
DEVICES = {"sm_90": (132, 227 * KIB, 228 * KIB), "sm_89": (128, 99 * KIB, 100 * KIB), "small": (2, 20 * KIB, 20 * KIB)}


class Emulated:
    """Stands in for `_max_flow_native._solve`."""

    def __init__(self, team, device: str = "sm_90", skipped_barrier: int = 0) -> None:
        self.team, self.device, self.skipped_barrier = team, DEVICES[device], skipped_barrier
        self.plan = None

    def solve(self, name: str, tensor: torch.Tensor, *given) -> None:
        seed = int(torch.randint(2**31, ()))
        where = (*self.device, seed, self.skipped_barrier)
        self.plan = getattr(self.team, name)(*given, where)


def on_team(emulated: Emulated, call, *given):
    """What `call` of `_max_flow_native` gives where the emulation solves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_solve", emulated.solve)
        return call(*given)


def subgraphs(frames: int, hops: int, tokens=3, positions=2, ties=False, dtype=torch.float64):
    """Cross-attention and hops; with ties small whole numbers, a third of them zero."""
    shapes = [(1, tokens, frames, positions), *[(1, positions, frames, frames)] * hops]
    if ties:
        return [(torch.randint(0, 3, shape)).to(dtype) for shape in shapes]
    drawn = [(3 * torch.randn(shape, dtype=dtype)) for shape in shapes]
    return [drawn[0].softmax(1) * 3, *[t.softmax(-1) for t in drawn[1:]]]


def assert_same(found, wanted) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("frames, hops", [(1, 1), (3, 0), (5, 2), (16, 2), (21, 3), (33, 1)])
@pytest.mark.drawn(8, of="long tests")
def test_subgraphs(flow_team, frames, hops, sink, device):
    for ties in (False, True):
        for residual in ("average", "add", None):
            cross, *temporal = subgraphs(frames, hops, ties=ties)
            given = (cross, temporal, residual, sink)
            found = on_team(Emulated(flow_team, device), native.subgraph_forward, *given)
            assert_same(found, native.subgraph_forward(*given))


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("sink, tokens", [("video", 9), ("frame", 1)])
@pytest.mark.parametrize("device", DEVICES)
def test_64_frames(flow_team, device, sink, tokens):
    """The largest there is, where the flow of every arc is in device memory."""
    cross, *temporal = subgraphs(64, 2, tokens, 1, dtype=torch.float32)
    team = Emulated(flow_team, device)
    found = on_team(team, native.subgraph_forward, cross, temporal, "average", sink)
    assert_same(found, native.subgraph_forward(cross, temporal, "average", sink))
    assert not team.plan["far_in_shared"]


@pytest.mark.drawn(6)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nodes", [2, 3, 17, 33, 64])
def test_any_graph(flow_team, nodes, device):
    """Random graphs, dense and sparse; many have no way from source to sink."""
    for density in (0.03, 0.3, 1.0):
        for top in (3, 1000):
            capacity = torch.randint(0, top, (9, nodes, nodes)).double()
            capacity *= torch.rand(9, nodes, nodes) < density
            given = (capacity, nodes - 1, 0)
            found = on_team(Emulated(flow_team, device), native.forward, *given)
            assert_same(found, native.forward(*given))


def test_definition(flow_team):
    """Against the reference, which shares no code."""
    cross, *temporal = subgraphs(6, 2, ties=True)
    found = on_team(Emulated(flow_team), native.subgraph_forward, cross, temporal, None, "frame")
    flow, cut = reference.subgraph_max_flow(cross, temporal, residual=None, sink="frame")
    assert_same(found, (flow, cut, True))


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_what_is_no_capacity_is_told(flow_team, bad):
    cross, *temporal = subgraphs(5, 2)
    for tensor in (cross, *temporal):
        given = [t.clone() for t in (cross, *temporal)]
        next(t for t in given if torch.equal(t, tensor)).view(-1)[-1] = bad
        call = (given[0], given[1:], "add", "video")
        assert not on_team(Emulated(flow_team), native.subgraph_forward, *call)[2]


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, warps_at_once", [(16, 24), (32, 8), (64, 16)])
def test_warps_of_a_processor(flow_team, frames, warps_at_once):
    """At 64 frames it were 2, if all that a graph can need were in shared memory."""
    cross, *temporal = subgraphs(frames, 2, 16, 1)
    team = Emulated(flow_team)
    on_team(team, native.subgraph_forward, cross, temporal, "average", "video")
    blocks = DEVICES["sm_90"][2] // (team.plan["shared"] + KIB)  # a block takes 1 KiB besides
    assert team.plan["warps"] * blocks >= warps_at_once


# --- faults ----------------------------------------------------------------------------------------------------------


CASES = [(9, 2, 9, "video"), (5, 2, 9, "frame"), (3, 0, 1, "video"), None]


def solve_case(team: Emulated, case: tuple | None) -> None:
    """Several graphs a warp, several tasks a block; for `None` graphs of any kind."""
    if case is None:
        on_team(team, native.forward, torch.randint(0, 9, (200, 12, 12)).double(), 0, 1)
        return
    frames, hops, tokens, sink = case
    cross, *temporal = subgraphs(frames, hops, tokens, 13)
    on_team(team, native.subgraph_forward, cross, temporal, "average", sink)


def test_no_barrier_can_be_left_out(flow_team):
    """The watch tells of each that is missing, wherever it is needed in one of the cases."""
    places, seen = set(), set()
    for case in CASES:
        team = Emulated(flow_team, "small")
        solve_case(team, case)
        met = flow_team.barriers_met()
        places |= set(met)
        for place in met:
            team.skipped_barrier = place
            try:
                solve_case(team, case)
            except RuntimeError as error:
                assert "no barrier between" in str(error)
                seen.add(place)
    assert len(places) >= 8 and places == seen
