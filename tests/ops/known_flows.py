"""The graphs on which networkx and scipy test their own maximum flows, and each as a graph of attention.

The graphs are those of `networkx/algorithms/flow/tests/test_maxflow.py` and `test_gomory_hu.py` (3.6) and of
`scipy/sparse/csgraph/tests/test_flow.py` (1.17), and so are the values where those files state them. The others, and
the nodes on the source's side of the cuts, come from networkx's Edmonds–Karp and a search of its residual network.
"""

from __future__ import annotations

import itertools
from graphlib import TopologicalSorter
from typing import NamedTuple

import torch

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


#: Minimum cut between any two nodes of the graph of Wikipedia's article on Gomory–Hu trees.
WIKIPEDIA_CUTS = [
    [0, 6, 8, 6, 6, 6],
    [6, 0, 6, 6, 7, 6],
    [8, 6, 0, 6, 6, 6],
    [6, 6, 6, 0, 6, 8],
    [6, 7, 6, 6, 0, 6],
    [6, 6, 6, 8, 6, 0],
]


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


def instances_as_attention() -> tuple[torch.Tensor, list[torch.Tensor]]:
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
