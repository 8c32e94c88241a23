"""Exact flow through all positions: against its definition, the small graphs, known ones, cuts, paths and finite
differences.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cvg_kernels.reference.path_flow import residual_hop

import cvg_kernels as cvg
from cvg_kernels.reference import coupled_max_flow as reference
from tests.ops.backends import backends
from tests.ops.known_flows import ACYCLIC, FLOWS, FRAMES, FREE, HOPS, assert_cut, instances_as_attention

BACKENDS = backends("coupled_max_flow")


def graph(batch=2, tokens=3, frames=3, positions=4, hops=2, dtype=torch.float64, peak=2.0):
    def attention(*shape):
        return (peak * torch.randn(*shape, dtype=dtype)).softmax(-1)

    cross = torch.rand(batch, tokens, frames, positions, dtype=dtype)
    temporal = [attention(batch, positions, frames, frames) for _ in range(hops)]
    return cross, temporal, attention(batch, frames, positions, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(2, 3, 3, 4, 2), (1, 1, 1, 1, 0), (1, 2, 4, 3, 1), (1, 2, 1, 5, 2)])
@pytest.mark.parametrize("residual", ["average", "add", None])
def test_kernel_and_definition(dtype, sizes, residual):
    cross, temporal, spatial = graph(*sizes, dtype=dtype)
    with cvg.trace_backends() as ran:
        flow, cut = cvg.coupled_max_flow(cross, temporal, spatial, residual=residual, backend="native")
    assert ran == [("coupled_max_flow", "native")]
    wanted, side = reference.coupled_max_flow(
        cross.double(),
        residual_hop(spatial.double(), residual),
        [residual_hop(hop.double(), residual) for hop in temporal],
    )
    torch.testing.assert_close(flow.double(), wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(cut, side)


def test_positions_that_do_not_meet_are_the_small_graphs():
    cross, temporal, _ = graph()
    whole = cvg.coupled_max_flow(cross, temporal).flow
    parts = cvg.subgraph_max_flow(cross, temporal, sink="video").flow.sum(-1)
    torch.testing.assert_close(whole, parts)


def test_between_path_flow_and_its_bounds():
    """At least the widest single path, at most what leaves the token; more edges never less."""
    cross, temporal, spatial = graph(frames=4, positions=6, peak=4.0)
    flow = cvg.coupled_max_flow(cross, temporal, spatial).flow
    paths = cvg.path_flow(cross, temporal, spatial=spatial)
    assert (flow >= paths.amax((2, 3)) - 1e-12).all()
    assert (flow <= cross.sum((2, 3)) + 1e-12).all()
    more = cvg.coupled_max_flow(cross, temporal, spatial + 0.1).flow
    assert (more >= flow - 1e-12).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_that_of_finite_differences(backend):
    cross, temporal, spatial = graph(batch=1, tokens=2, frames=2, positions=3)
    leaves = [tensor.requires_grad_() for tensor in (cross, spatial, *temporal)]

    def flow(cross, spatial, *temporal):
        return cvg.coupled_max_flow(cross, temporal, spatial, backend=backend).flow

    assert torch.autograd.gradcheck(flow, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_capacities_of_every_kind(backend):
    """Zeros, ties, tiny and huge numbers end, and the cut carries the flow."""
    cross, temporal, spatial = graph(batch=1, positions=3)
    for factor in (0.0, 1e-310, 1e30):
        flow, cut = cvg.coupled_max_flow(cross * factor, temporal, spatial, residual=None, backend=backend)
        assert torch.isfinite(flow).all() and (flow <= 9).all()
    ties = [(4 * hop).round() / 4 for hop in temporal]
    found = cvg.coupled_max_flow(
        (4 * cross).round() / 4, ties, (4 * spatial).round() / 4, residual=None, backend=backend
    )
    assert ((8 * found.flow) % 1 == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.5])
def test_what_is_no_capacity_is_named(backend, bad):
    cross, temporal, spatial = graph()
    spatial[1, 2, 0, 3] = bad
    with pytest.raises(cvg.ArgumentError, match=r"spatial must hold finite capacities.*\[1, 2, 0, 3\]"):
        cvg.coupled_max_flow(cross, temporal, spatial, residual=None, backend=backend)


def test_errors_name_the_argument():
    cross, temporal, spatial = graph()
    with pytest.raises(cvg.ArgumentError, match=r"spatial must be torch.float64 \(2, 3, 4, 4\)"):
        cvg.coupled_max_flow(cross, temporal, spatial[:, :2])
    with pytest.raises(cvg.ArgumentError, match=r"temporal\[1\] must be torch.float64"):
        cvg.coupled_max_flow(cross, [temporal[0], temporal[1].float()])
    with pytest.raises(cvg.BackendUnavailableError, match="coupled_max_flow has no triton kernel"):
        cvg.coupled_max_flow(cross, temporal, backend="triton")


@pytest.mark.drawn(8, of="long tests")
def test_empty_and_registered():
    cross, temporal, spatial = graph()
    empty = cvg.coupled_max_flow(cross[:0], [hop[:0] for hop in temporal], spatial[:0])
    assert empty.flow.shape == (0, 3) and empty.cut.shape == (0, 3, 4, 3, 4)
    torch.library.opcheck(
        torch.ops.cvg_kernels.coupled_max_flow.default, (cross.requires_grad_(), spatial, temporal, "native")
    )

    def flow(cross, spatial, first):
        return cvg.coupled_max_flow(cross, [first], spatial).flow

    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cross, spatial, temporal[0]), flow(cross, spatial, temporal[0]))


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_known_graphs(backend, spread):
    """All at once; with `spread`, the token sees the first position only, and attention within the frame does the
    rest.
    """
    cross, temporal = instances_as_attention()
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


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_graphs_by_networkx(backend, within):
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
