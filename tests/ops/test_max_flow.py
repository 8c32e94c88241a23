"""max_flow and subgraph_max_flow on every backend, against every cut there is, other people's graphs and solvers."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cvg_kernels as cvg
from cvg_kernels.bench.max_flow import TOKENS, arcs_of, attention, capacities_of, ortools_flows
from cvg_kernels.cli import main
from tests.ops.known_flows import ACYCLIC, FLOWS, INSTANCES, WIKIPEDIA_CUTS, assert_cut, instances_as_attention
from tests.ops.max_flows import BACKENDS, EPS, FAST, attention_graphs, max_flow, subgraph_max_flow

# --- every cut there is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", range(2, 9))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cut(backend, nodes):
    """Small whole numbers are exact and full of ties: the cut is the intersection of all that are minimal."""
    capacity = torch.randint(0, 4, (40, nodes, nodes)).double()
    capacity *= torch.rand(40, nodes, nodes) < torch.rand(40, 1, 1)
    flow, side = max_flow(capacity, backend=backend)
    others = itertools.product([False, True], repeat=nodes - 2)
    subsets = torch.tensor([(True, False, *rest) for rest in others])  # [S, n]: 0 in, 1 out
    severed = (subsets[:, :, None] & ~subsets[:, None, :]).double()
    values = torch.einsum("sij,gij->gs", severed, capacity)
    assert torch.equal(flow, values.amin(1))
    minimal = values == values.amin(1, keepdim=True)  # [G, S]
    smallest = (~minimal[:, :, None] | subsets).all(1)
    assert torch.equal(side, smallest)


@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cut_of_a_subgraph(backend, sink):
    frames = 3
    cross, (hop,) = torch.randint(0, 4, (2, 2, frames, 2)), torch.randint(0, 3, (1, 2, 2, 3, 3))
    flow, cut = subgraph_max_flow(cross.double(), [hop.double()], None, sink, backend)
    sides = list(itertools.product([0, 1], repeat=frames))
    for b, k, place, frame in itertools.product(range(2), range(2), range(2), range(frames)):
        values = {}
        for first, last in itertools.product(sides, repeat=2):
            if sink == "frame" and last != tuple(int(i != frame) for i in range(frames)):
                continue
            value = sum(cross[b, k, j, place] for j in range(frames) if not first[j])
            for i, j in itertools.product(range(frames), repeat=2):
                value += hop[b, place, i, j] * (first[j] and not last[i])
            values[first, last] = value + (sum(last) if sink == "video" else 0)
        best = min(values.values())
        sides_of_best = np.array([pair for pair, value in values.items() if value == best])
        one, side = flow[b, k], cut[b, k, place]
        assert best == (one[frame, place] if sink == "frame" else one[place])
        side = side[frame] if sink == "frame" else side
        assert np.array_equal(side.numpy(), sides_of_best.min(0))


# --- other people's graphs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_cut_of_known_graphs(backend, name, dtype):
    one = INSTANCES[name]
    flow, side = max_flow(one.capacity().to(dtype), 0, len(one.nodes) - 1, backend)
    assert flow.item() == one.flow
    assert side[0].tolist() == [node in one.near for node in one.nodes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pair_of_nodes_of_a_known_graph(backend):
    capacity = INSTANCES["networkx gomory_hu wikipedia"].capacity()
    for source, sink in itertools.permutations(range(6), 2):
        flow, _ = max_flow(capacity, source, sink, backend)
        assert flow.item() == WIKIPEDIA_CUTS[source][sink]


@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_known_graphs_as_attention(backend, sink):
    cross, temporal = instances_as_attention()
    flow, cut = subgraph_max_flow(cross, temporal, None, sink, backend)
    if sink == "frame":
        assert not flow[0, 0, :-1].any()
        flow, cut = flow[:, :, -1], cut[:, :, :, -1]
    assert torch.equal(flow[0, 0], FLOWS)
    for place, one in enumerate(ACYCLIC.values()):
        assert_cut(one, cut[0, 0, place])


@pytest.mark.parametrize("backend", FAST)
def test_karate_club(backend):
    """The largest graph of `test_gomory_hu.py` that fits, every pair of its 34 nodes."""
    networkx = pytest.importorskip("networkx")
    club = networkx.karate_club_graph()
    networkx.set_edge_attributes(club, 1, "capacity")
    tree = networkx.gomory_hu_tree(club)
    capacity = torch.from_numpy(networkx.to_numpy_array(club, weight=None))[None]
    for source, sink in itertools.combinations(range(34), 2):
        path = networkx.shortest_path(tree, source, sink)
        wanted = min(tree.edges[edge]["weight"] for edge in itertools.pairwise(path))
        assert max_flow(capacity, source, sink, backend)[0].item() == wanted


# --- other people's solvers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("residual", ["average", "add", None])
@pytest.mark.parametrize("frames", [1, 4, 16, 21, 32, 64])
@pytest.mark.parametrize("backend", FAST)
def test_ortools_on_a_grid(backend, frames, residual, sink):
    """Capacities in multiples of 2⁻²⁴: the same number, to the last bit of float32."""
    pytest.importorskip("ortools")
    graphs = {1: 24, 4: 64, 16: 96, 21: 84, 32: 64, 64: 32}[frames]
    positions = max(1, graphs // (TOKENS * (frames if sink == "frame" else 1)))
    for sharp in (0.5, 3.0):
        cross, temporal = attention(frames, positions, sharp, torch.float32)
        flow, _ = subgraph_max_flow(cross, temporal, residual, sink, backend)
        arcs = arcs_of(frames, len(temporal), sink)
        capacities, scale = capacities_of(cross, temporal, residual, sink)
        wanted = torch.tensor(ortools_flows(arcs, capacities), dtype=torch.float64) / scale
        found = flow.mT if sink == "frame" else flow
        assert torch.equal(found.flatten(), wanted.float())


@pytest.mark.parametrize("nodes", [2, 9, 33, 64])
@pytest.mark.parametrize("backend", FAST)
def test_networkx_and_scipy(backend, nodes):
    networkx = pytest.importorskip("networkx")
    flow_of = pytest.importorskip("scipy.sparse.csgraph").maximum_flow
    from scipy.sparse import csr_array

    capacity = torch.randint(0, 1000, (6, nodes, nodes)) * (torch.rand(6, nodes, nodes) < 0.3)
    source, sink = nodes - 1, nodes // 2 - (nodes == 2)
    flow, side = max_flow(capacity.double(), source, sink, backend)
    for graph, found, near in zip(capacity.numpy(), flow, side, strict=True):
        assert flow_of(csr_array(graph.astype(np.int32)), source, sink).flow_value == found
        drawn = networkx.from_numpy_array(graph, create_using=networkx.DiGraph)
        drawn = networkx.DiGraph((u, v, {"capacity": w["weight"]}) for u, v, w in drawn.edges.data())
        drawn.add_nodes_from(range(nodes))
        value, (reached, _) = networkx.minimum_cut(drawn, source, sink)
        assert value == found
        assert near.sum() <= len(reached)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("hops", [0, 1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 7, 16])
@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("backend", FAST)
def test_definition(backend, sink, frames, hops):
    cross, temporal = attention_graphs(2, 3, frames, 2 if frames < 16 else 1, hops)
    for residual in ("average", "add", None):
        flow, cut = subgraph_max_flow(3 * cross, temporal, residual, sink, backend)
        wanted, side = subgraph_max_flow(3 * cross, temporal, residual, sink, "reference")
        torch.testing.assert_close(flow, wanted, rtol=1000 * EPS, atol=0)
        assert torch.equal(cut, side)


@pytest.mark.parametrize("residual", ["average", "add", None])
@pytest.mark.parametrize("backend", FAST)
def test_the_widest_path_is_a_lower_bound(backend, residual):
    cross, temporal = attention_graphs(2, 4, 16, 6)
    flow, _ = subgraph_max_flow(cross, temporal, residual, "frame", backend)
    widest = cvg.path_flow(cross, temporal, residual=residual)
    assert (widest <= flow * (1 + 1000 * EPS)).all()
    assert (widest < 0.9 * flow).any()


@pytest.mark.parametrize("backend", FAST)
def test_weak_duality(backend):
    """No cut, however it is drawn, is smaller."""
    capacity = torch.rand(20, 30, 30, dtype=torch.float64) ** 4
    flow, side = max_flow(capacity, backend=backend)
    for _ in range(200):
        other = side ^ (torch.rand(30) < 0.1)  # near the cut, where the small ones are
        other[:, 0], other[:, 1] = True, False
        value = torch.where(other[:, :, None] & ~other[:, None, :], capacity, 0).sum((1, 2))
        assert (flow <= value * (1 + 1000 * EPS)).all()


# --- degenerate capacities -------------------------------------------------------------------------------------------

SPECIAL = [0.0, 1.0, 0.5, 0.1, 5e-324, 1e-310, 1e-45, 1e-38, 1e30, 1e300, 3.0, 1 / 3]


@given(
    nodes=st.integers(2, 12),
    values=st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_degenerate_capacities(nodes, values, seed):
    """Zeros, ties, denormals and huge ones: it ends, and the value is that of the definition."""
    rng = np.random.default_rng(seed)
    capacity = torch.from_numpy(rng.choice([0.0, *values], (3, nodes, nodes)))
    flow, _ = max_flow(capacity)
    torch.testing.assert_close(flow, max_flow(capacity, backend="reference")[0], rtol=1e-12, atol=0)


@given(
    frames=st.integers(1, 9),
    hops=st.integers(0, 3),
    values=st.lists(st.sampled_from([*SPECIAL[:-3], 1e30]), min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
    sink=st.sampled_from(["video", "frame"]),
)
@settings(max_examples=100, deadline=None)
def test_degenerate_subgraphs(frames, hops, values, seed, sink):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return torch.from_numpy(rng.choice([0.0, *values], shape))

    cross = draw(1, 2, frames, 2)
    temporal = [draw(1, 2, frames, frames) for _ in range(hops)]
    flow, _ = subgraph_max_flow(cross, temporal, None, sink)
    wanted, _ = subgraph_max_flow(cross, temporal, None, sink, "reference")
    torch.testing.assert_close(flow, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", FAST)
def test_float32_from_denormal_to_huge(backend):
    capacity = (10.0 ** (80 * torch.rand(50, 20, 20) - 44)).float()
    flow, _ = max_flow(capacity, backend=backend)
    wanted, _ = max_flow(capacity.double(), backend="reference")
    torch.testing.assert_close(flow.double(), wanted, rtol=1e-7, atol=1.5e-45)


def test_flushed_denormals_do_not_stall_it():
    """With denormals flushed, differences of unequal numbers can be 0: it ends, and loses no more than those."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        smallest = torch.finfo(torch.float64).tiny
        capacity = smallest * (1 + torch.rand(200, 12, 12, dtype=torch.float64).mul(4).round() / 4)
        flow, _ = cvg.max_flow(capacity, 0, 1, backend="native")
    finally:
        torch.set_flush_denormal(False)
    wanted, _ = cvg.max_flow(capacity, 0, 1, backend="reference")
    torch.testing.assert_close(flow, wanted, rtol=0, atol=150 * smallest)


def test_benchmark(tmp_path, capsys):
    """It checks every flow against OR-tools before it times anything."""
    pytest.importorskip("ortools")
    threads, path = torch.get_num_threads(), tmp_path / "max_flow.json"
    given = ["bench", "max_flow", "--quick", "--rounds", "1", "--json", str(path)]
    assert main(given) == 0
    cases = json.loads(path.read_text())["cases"]
    assert [case["sink"] for case in cases] == ["frame", "frame", "video", "video"]
    assert all(case["seconds"].keys() == {"OR-tools", "cvg_kernels"} for case in cases)
    assert "16 frames to frame, peaked" in capsys.readouterr().out
    assert torch.get_num_threads() == threads
