"""The graphs on which networkx and scipy test their own maximum flows: value and cut, by each of our three forms.

The graphs are those of `networkx/algorithms/flow/tests/test_maxflow.py` and `test_gomory_hu.py` (3.6) and of
`scipy/sparse/csgraph/tests/test_flow.py` (1.17), and so are the values where those files state them. The others, and
the nodes on the source's side of the cuts, come from networkx's Edmonds–Karp and a search of its residual network.
"""

from __future__ import annotations

import itertools
from graphlib import TopologicalSorter
from typing import NamedTuple

import pytest
import torch

import cvg_kernels as cvg
from tests.ops.backends import backends
from tests.ops.max_flows import BACKENDS, FAST, max_flow, subgraph_max_flow

INFINITE = 1000  # more than what else a graph has together


class Instance(NamedTuple):
    edges: dict[str, int]  #: two letters, tail and head → capacity
    ends: str  #: source and sink
    flow: int
    near: str  #: the smallest source's side of a minimum cut
    directed: bool = True

    @property
    def nodes(self) -> list[str]:
        """The source first, the sink last."""
        source, sink = self.ends
        return [source, *sorted(set("".join(self.edges)) - {source, sink}), sink]

    def capacity(self) -> torch.Tensor:
        index = {node: at for at, node in enumerate(self.nodes)}
        capacity = torch.zeros(1, len(index), len(index), dtype=torch.float64)
        for (tail, head), room in self.edges.items():
            capacity[0, index[tail], index[head]] = room
            if not self.directed:
                capacity[0, index[head], index[tail]] = room
        return capacity


TOPCODER = {"xa": 3, "xb": 1, "ac": 3, "bc": 5, "bd": 4, "de": 2, "cy": 2, "ey": 3}
CORMEN = {"s1": 16, "s2": 13, "12": 10, "21": 4, "13": 12, "32": 9, "24": 14, "43": 7, "3t": 20, "4t": 4}
DINITZ = {"s1": 10, "s2": 10, "13": 4, "14": 8, "12": 2, "24": 9, "3t": 10, "43": 6, "4t": 10}
BACKWARDS = {"01": 10, "04": 10, "12": 10, "23": 10, "37": 10, "43": 10, "45": 10, "56": 10, "67": 10}
CLASSIC = {"ab": 1000, "ac": 1000, "bc": 1, "bd": 1000, "cd": 1000}
NO_FLOW = {"sb": 2, "sc": 1, "cd": 1, "da": 1, "ba": 2, "at": 2}
FREE_EDGES = {"sa": INFINITE, "sb": 30, "ac": 25, "bc": 12, "at": 60, "ct": INFINITE}
FREE_DIGON = {"sa": 85, "sb": 30, "ac": INFINITE, "ca": INFINITE, "bc": 12, "at": 60, "ct": 37}
TICKET_429 = {"sa": 2, "sb": 2, "ab": 5, "at": 1, "ba": 1, "bt": 3}
WIKIPEDIA = {"01": 1, "02": 7, "12": 1, "13": 3, "14": 2, "24": 4, "34": 1, "35": 6, "45": 2}
COMPLETE = dict.fromkeys(("".join(pair) for pair in itertools.combinations("01234", 2)), 1)

#: Those without a cycle, which are also drawn as graphs of attention below.
ACYCLIC = {
    "networkx digraph1": Instance(CLASSIC, "ad", 2000, "a"),
    "networkx digraph2": Instance(NO_FLOW, "st", 2, "abcds"),
    "networkx digraph4": Instance(TOPCODER, "xy", 3, "acx"),
    "networkx wikipedia_dinitz": Instance(DINITZ, "st", 19, "2s"),
    "networkx digraph_infcap_edges": Instance(FREE_EDGES, "st", 97, "abs"),
    "networkx preflow_push_makes_enough_space": Instance({"01": 1, "13": 1, "12": 1, "23": 1}, "03", 1, "0"),
    "scipy simple": Instance({"01": 5}, "01", 5, "0"),
    "scipy bottle_neck": Instance({"01": 5, "12": 3}, "02", 3, "01"),
    "scipy backwards_flow": Instance(BACKWARDS, "07", 20, "0"),
}
INSTANCES = ACYCLIC | {
    "networkx graph1": Instance({"12": 1}, "12", 1, "1", directed=False),
    "networkx graph2": Instance(TOPCODER, "xy", 4, "x", directed=False),
    "networkx graph_infcap_edges": Instance(FREE_EDGES, "st", 97, "abs", directed=False),
    "networkx complete_graph": Instance(COMPLETE, "04", 4, "0", directed=False),
    "networkx disconnected": Instance({"23": 1}, "03", 0, "0", directed=False),
    "networkx gomory_hu wikipedia": Instance(WIKIPEDIA, "05", 6, "02", directed=False),
    "networkx digraph3, scipy clrs": Instance(CORMEN, "st", 23, "124s"),
    "networkx digraph_infcap_edges, digon": Instance(FREE_DIGON, "st", 97, "bs"),
    "networkx digraph5": Instance(TICKET_429, "st", 4, "s"),
    "scipy disconnected": Instance({"01": 5, "22": 9, "23": 3}, "03", 0, "01"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_cut(backend, name, dtype):
    one = INSTANCES[name]
    flow, side = max_flow(one.capacity().to(dtype), 0, len(one.nodes) - 1, backend)
    assert flow.item() == one.flow
    assert side[0].tolist() == [node in one.near for node in one.nodes]


#: Minimum cut between any two nodes of the graph of Wikipedia's article on Gomory–Hu trees.
WIKIPEDIA_CUTS = [
    [0, 6, 8, 6, 6, 6],
    [6, 0, 6, 6, 7, 6],
    [8, 6, 0, 6, 6, 6],
    [6, 6, 6, 0, 6, 8],
    [6, 7, 6, 6, 0, 6],
    [6, 6, 6, 8, 6, 0],
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pair_of_nodes(backend):
    capacity = INSTANCES["networkx gomory_hu wikipedia"].capacity()
    for source, sink in itertools.permutations(range(6), 2):
        flow, _ = max_flow(capacity, source, sink, backend)
        assert flow.item() == WIKIPEDIA_CUTS[source][sink]


# --- as graphs of attention ------------------------------------------------------------------------------------------

UNIT = 2.0**-12  # of capacity: no flow reaches the 1 that a frame of a video takes
FREE = INFINITE * INFINITE * UNIT
FRAMES, HOPS = 8, 5  # the most nodes and the longest path


def levels(one: Instance) -> dict[str, int]:
    """After how many hops, at most, a node is reached; the sink after all."""
    tails = {node: [tail for tail, head in one.edges if head == node] for node in one.nodes}
    found: dict[str, int] = {}
    for node in TopologicalSorter(tails).static_order():
        found[node] = max((found[tail] + 1 for tail in tails[node]), default=0)
    return found | {one.ends[1]: HOPS}


def attention_graphs() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The acyclic instances, one a position, nodes as frames: each waits at its frame until its last edge has left.

    An edge u → v is part of the hop that ends at the level of v. The token feeds the source alone.
    """
    cross = torch.zeros(1, 1, FRAMES, len(ACYCLIC), dtype=torch.float64)
    hops = torch.zeros(HOPS, 1, len(ACYCLIC), FRAMES, FRAMES, dtype=torch.float64)
    cross[0, 0, 0] = FREE
    for place, one in enumerate(ACYCLIC.values()):
        level, index = levels(one), frames_of(one)
        for (tail, head), room in one.edges.items():
            arrival = level[head] - 1
            hops[arrival, 0, place, index[head], index[tail]] = room * UNIT
            for hop in range(level[tail], arrival):
                hops[hop, 0, place, index[tail], index[tail]] = FREE
    return cross, list(hops)


def frames_of(one: Instance) -> dict[str, int]:
    """Frame of each node: the source first, the sink last."""
    return {node: at for at, node in enumerate(one.nodes[:-1])} | {one.ends[1]: FRAMES - 1}


def assert_cut(one: Instance, cut: torch.Tensor) -> None:
    """Each node, where it is first reached, lies on its side of the cut `[hops + 1, F]`."""
    level, index = levels(one), frames_of(one)
    found = {node: cut[level[node], index[node]].item() for node in one.nodes}
    assert found == {node: node in one.near for node in one.nodes}


FLOWS = torch.tensor([one.flow * UNIT for one in ACYCLIC.values()], dtype=torch.float64)


@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_subgraphs(backend, sink):
    cross, temporal = attention_graphs()
    flow, cut = subgraph_max_flow(cross, temporal, None, sink, backend)
    if sink == "frame":
        assert not flow[0, 0, :-1].any()
        flow, cut = flow[:, :, -1], cut[:, :, :, -1]
    assert torch.equal(flow[0, 0], FLOWS)
    for place, one in enumerate(ACYCLIC.values()):
        assert_cut(one, cut[0, 0, place])


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("backend", backends("coupled_max_flow"))
def test_coupled(backend, spread):
    """All at once; with `spread`, the token sees the first position only, and attention within the frame does the
    rest.
    """
    cross, temporal = attention_graphs()
    spatial = None
    if spread:
        cross[..., 1:] = 0
        spatial = cross.new_zeros(1, FRAMES, len(ACYCLIC), len(ACYCLIC))
        spatial[0, 0, :, 0] = FREE
    with cvg.trace_backends() as ran:
        flow, cut = cvg.coupled_max_flow(cross, temporal, spatial, residual=None, backend=backend)
    assert ran == [("coupled_max_flow", backend)]
    assert flow.item() == FLOWS.sum()
    for place, one in enumerate(ACYCLIC.values()):
        assert_cut(one, cut[0, 0, -HOPS - 1 :, :, place])


# --- networkx itself -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("backend", backends("coupled_max_flow"))
def test_random_coupled_graphs(backend, within):
    """Drawn edge by edge from the contract; whole multiples of ¼ are exact and full of ties."""
    networkx = pytest.importorskip("networkx")
    frames, positions, hops = 3, 4, 2
    for _ in range(20):
        cross, *temporal = (
            torch.randint(0, 4, shape).double() / 4
            for shape in [(1, 1, frames, positions)] + [(1, positions, frames, frames)] * hops
        )
        spatial = torch.randint(0, 3, (1, frames, positions, positions)).double() / 4
        graph, first = networkx.DiGraph(), int(within)
        places = list(itertools.product(range(frames), range(positions)))
        for f, p in places:
            graph.add_edge("token", (0, f, p), capacity=cross[0, 0, f, p].item())
            graph.add_edge((first + hops, f, p), "sink", capacity=1.0)
            for other in range(positions if within else 0):
                graph.add_edge((0, f, other), (1, f, p), capacity=spatial[0, f, p, other].item())
            for h, other in itertools.product(range(hops), range(frames)):
                ends = (first + h, other, p), (first + h + 1, f, p)
                graph.add_edge(*ends, capacity=temporal[h][0, p, f, other].item())
        residual = networkx.algorithms.flow.edmonds_karp(graph, "token", "sink")
        full = [e[:2] for e in residual.edges.data() if e[2]["capacity"] <= e[2]["flow"]]
        value = residual.graph["flow_value"]
        residual.remove_edges_from(full)
        near = networkx.descendants(residual, "token")
        flow, cut = cvg.coupled_max_flow(cross, temporal, spatial if within else None, residual=None, backend=backend)
        assert flow.item() == value
        assert {tuple(node) for node in cut[0, 0].nonzero().tolist()} == near
