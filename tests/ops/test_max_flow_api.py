"""Exact maximum flow as torch sees it: gradients, registration, compilation, layouts, corners, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import cvg_kernels as cvg
from cvg_kernels import native
from tests.ops.checks import Counter
from tests.ops.max_flows import BACKENDS, FAST, attention_graphs, max_flow, on
from tests.ops.max_flows import subgraph_max_flow as checked_flow

STEP = 1e-6


def leaves(tensors, backend="native"):
    return [on(backend, tensor).clone().requires_grad_() for tensor in tensors]


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("residual", ["average", "add", None])
@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_subgraphs(backend, sink, residual):
    cross, temporal = attention_graphs(1, 2, 4, 2)
    given = leaves((2 * cross, *temporal), backend)

    def flow(cross, *temporal):
        return cvg.subgraph_max_flow(cross, temporal, residual=residual, sink=sink, backend=backend).flow

    assert torch.autograd.gradcheck(flow, given, eps=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_of_graphs(backend):
    (capacity,) = leaves([torch.rand(6, 7, 7, dtype=torch.float64)], backend)
    assert torch.autograd.gradcheck(
        lambda capacity: cvg.max_flow(capacity, 2, 5, backend=backend).flow, capacity, eps=1e-7
    )


@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("backend", FAST)
def test_finite_differences_at_real_size(backend, sink):
    """Edge by edge at 16 frames: wherever left and right slope agree, so off the ties, they are the gradient."""
    cross, temporal = attention_graphs(1, 2, 16, 1)
    given = leaves((cross, *temporal), backend)
    weights = torch.rand_like(cvg.subgraph_max_flow(given[0], given[1:], sink=sink).flow)

    def value(tensors):
        flow = cvg.subgraph_max_flow(tensors[0], tensors[1:], sink=sink, backend=backend).flow
        return (flow * weights).sum()

    grads = torch.autograd.grad(value(given), given)
    compared = 0
    for which, (tensor, grad) in enumerate(zip(given, grads, strict=True)):
        for at in torch.randperm(tensor.numel())[:60].tolist():
            moved = [t.detach().clone() for t in given]
            place = moved[which].view(-1)
            before, here = place[at].item(), value(moved)
            if before < STEP:
                continue
            place[at] = before + STEP
            right = (value(moved) - here) / STEP
            place[at] = before - STEP
            left = (here - value(moved)) / STEP
            if abs(left - right) < 1e-8:
                compared += 1
                assert abs(grad.view(-1)[at] - right) < 1e-6
    assert compared > 100


@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("residual", ["average", "add", None])
@pytest.mark.parametrize("backend", FAST)
def test_gradients_are_those_of_the_definition(backend, residual, sink):
    cross, temporal = attention_graphs(2, 3, 5, 3, hops=3)
    weights = torch.randn(2, 3, 5, 3, dtype=torch.float64)
    found = []
    for which in (backend, "reference"):
        given = leaves((cross, *temporal), which)
        flow = cvg.subgraph_max_flow(given[0], given[1:], residual=residual, sink=sink, backend=which).flow
        loss = flow * on(which, weights[:, :, : flow.shape[2]].reshape(-1)[: flow.numel()]).view_as(flow)
        found.append([g.cpu() for g in torch.autograd.grad(loss.sum(), given)])
    for grad, wanted in zip(*found, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


def test_only_what_is_asked_for():
    """A hop that needs no gradient has none, and the others have the same one."""
    cross, temporal = attention_graphs()
    given = leaves((3 * cross, *temporal))
    wanted = torch.autograd.grad(cvg.subgraph_max_flow(given[0], given[1:]).flow.sum(), given)
    with cvg.trace_backends() as ran:
        flow = cvg.subgraph_max_flow(3 * cross, [given[1], temporal[1]]).flow
        (grad,) = torch.autograd.grad(flow.sum(), given[1])
    assert ran == [("max_flow", "native"), ("max_flow_backward", "native")]
    assert torch.equal(grad, wanted[1])


@pytest.mark.parametrize("backend", FAST)
def test_no_second_derivative_in_the_kernels(backend):
    cross, temporal = attention_graphs()
    (cross,), (capacity,) = leaves([cross], backend), leaves([torch.rand(2, 4, 4)], backend)
    for flow, leaf in (
        (cvg.subgraph_max_flow(cross, [on(backend, hop) for hop in temporal]).flow, cross),
        (cvg.max_flow(capacity, 0, 1).flow, capacity),
    ):
        weights = torch.rand_like(flow).requires_grad_()
        (grad,) = torch.autograd.grad((flow * weights).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="backend='reference'"):
            grad.sum().backward()


def test_the_reference_is_differentiable_twice():
    cross, temporal = attention_graphs()
    (cross,) = leaves([cross])
    flow = cvg.subgraph_max_flow(cross, temporal, backend="reference").flow
    (grad,) = torch.autograd.grad(flow.square().sum(), cross, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), cross)
    assert torch.isfinite(second).all() and second.abs().sum() > 0


# --- torch.library and torch.compile ---------------------------------------------------------------------------------


@pytest.mark.drawn(6)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("backend, dtype", [("native", torch.float32), ("reference", torch.float64)])
@pytest.mark.parametrize("sink", ["video", "frame"])
def test_opcheck_of_subgraphs(sink, backend, dtype, requires_grad):
    cross, temporal = attention_graphs(1, 2, 3, 2, dtype=dtype)
    for tensor in (cross, *temporal):
        tensor.requires_grad_(requires_grad)
    arguments = (cross, temporal, "average", sink, backend)
    ops = torch.ops.cvg_kernels
    torch.library.opcheck(ops.subgraph_max_flow.default, arguments)
    flow, cut = ops.subgraph_max_flow(*arguments)
    needs = (True, [False, True]) if requires_grad else (False, [True, True])
    torch.library.opcheck(
        ops.subgraph_max_flow_backward.default, (torch.rand_like(flow).detach(), cut, "average", sink, *needs, backend)
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck_of_graphs(backend):
    capacity = torch.rand(3, 5, 5, requires_grad=True)
    ops = torch.ops.cvg_kernels
    torch.library.opcheck(ops.max_flow.default, (capacity, 0, 4, backend))
    flow, side = ops.max_flow(capacity, 0, 4, backend)
    torch.library.opcheck(ops.max_flow_backward.default, (torch.rand(3), side))


def everything(cross, first, second):
    """Both operations, every output."""
    video = cvg.subgraph_max_flow(cross, [first, second])
    frame = cvg.subgraph_max_flow(cross, [first], sink="frame", residual=None)
    graphs = cvg.max_flow(first.flatten(0, 1), 0, first.shape[-1] - 1)
    cuts = video.cut.sum() + frame.cut.sum() + graphs.source_side.sum()
    return video.flow.square().sum() + frame.flow.sum() + graphs.flow.sum() + cuts


def test_fullgraph_compile():
    """One graph forward, one backward, equal to eager; other sizes compile once more, then never again."""
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(everything, fullgraph=True, backend=aot_autograd(fw_compiler=counter))
    graphs = []
    for frames, positions in ((4, 2), (5, 3), (6, 4), (7, 5)):
        cross, temporal = attention_graphs(1, 2, frames, positions)
        given = leaves((cross, *temporal))
        found, wanted = compiled(*given), everything(*given)
        torch.testing.assert_close(found, wanted)
        grads = torch.autograd.grad(found, given)
        torch.testing.assert_close(grads, torch.autograd.grad(wanted, given))
        graphs.append(counter.graphs)
    assert graphs == [2, 4, 4, 4]


# --- layouts, corners, threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("backend", FAST)
def test_any_strides(backend, sink):
    cross, temporal = attention_graphs(2, 3, 6, 4, dtype=torch.float32)
    wanted = checked_flow(cross, temporal, sink=sink, backend=backend)
    strided = cross.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    hops = [torch.stack([hop.mT, hop.mT], -1)[..., 0].mT for hop in temporal]
    assert not any(tensor.is_contiguous() for tensor in (strided, *hops))
    for have, want in zip(checked_flow(strided, hops, sink=sink, backend=backend), wanted, strict=True):
        assert torch.equal(have, want)
    given = leaves((cross, *temporal), backend)
    (grad,) = torch.autograd.grad(cvg.subgraph_max_flow(given[0], given[1:], sink=sink).flow.mT.sum(), given[:1])
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", FAST)
def test_any_strides_of_graphs(backend):
    capacity = torch.rand(4, 9, 9)
    wanted = max_flow(capacity, backend=backend)
    strided = torch.stack([capacity.mT] * 2, 1)[:, 0].mT
    assert all(map(torch.equal, max_flow(strided, backend=backend), wanted))
    expanded = capacity[:1].expand(3, -1, -1)
    assert torch.equal(max_flow(expanded, backend=backend)[0], wanted[0][:1].expand(3))


@pytest.mark.parametrize("sink", ["video", "frame"])
@pytest.mark.parametrize("hops", [0, 2])
@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 3, 0), (1, 1, 1, 1), (2, 1, 3, 1), (1, 1, 64, 1)],
    ids=["no-batch", "no-token", "no-position", "ones", "one-token", "64-frames"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_corners(backend, sizes, hops, sink):
    if backend == "reference" and sizes[2] == 64:
        pytest.skip("64 sinks of 194 nodes are slow in plain Python")
    cross, temporal = attention_graphs(*sizes, hops=hops)
    checked_flow(cross, temporal, sink=sink, backend=backend)
    given = leaves((cross, *temporal), backend)
    flow, cut = cvg.subgraph_max_flow(given[0], given[1:], sink=sink, backend=backend)
    grads = torch.autograd.grad(flow.sum(), given)
    # A flow is what its cut has room for, and the gradient of an edge how often the cuts sever it, each hop by half.
    # Of no flow at all this is 0, which terms that are all positive reach only if each gradient is 0.
    rooms = [given[0], *(hop + torch.eye(sizes[2]).to(hop) for hop in given[1:])]
    assert all((grad >= 0).all() for grad in grads)
    room = sum((grad * room).sum() for grad, room in zip(grads, rooms, strict=True))
    if sink == "video":  # the edges to the sink, each of 1
        room = room + cut[..., -1, :].sum()
    torch.testing.assert_close(room, flow.sum())


def test_without_hops():
    cross = 3 * torch.rand(1, 2, 4, 3)
    assert torch.equal(cvg.subgraph_max_flow(cross, [], sink="frame").flow, cross)
    video = cvg.subgraph_max_flow(cross, []).flow
    torch.testing.assert_close(video, cross.clamp(max=1).sum(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_graphs(backend):
    flow, side = max_flow(torch.zeros(0, 4, 4), backend=backend)
    assert flow.shape == (0,) and side.shape == (0, 4)


def test_threads_do_not_matter(one_thread):
    cross, temporal = attention_graphs(1, 29, 32, 3)  # enough that threads are used
    capacity = torch.rand(90, 32, 32)
    alone = (*cvg.subgraph_max_flow(cross, temporal), *cvg.max_flow(capacity, 0, 1))
    torch.set_num_threads(4)
    together = (*cvg.subgraph_max_flow(cross, temporal), *cvg.max_flow(capacity, 0, 1))
    assert all(map(torch.equal, alone, together))


def test_auto():
    """The kernels; the reference for what they cannot take, and where they are absent."""
    cross, temporal = attention_graphs()
    with cvg.trace_backends() as ran:
        cvg.subgraph_max_flow(cross, temporal)
        cvg.subgraph_max_flow(torch.rand(1, 1, 65, 1), [])
        cvg.subgraph_max_flow(torch.rand(1, 1, 2, 1), 17 * [torch.rand(1, 1, 2, 2)])
        cvg.max_flow(torch.eye(65)[None], 0, 1)
    assert [backend for _, backend in ran] == ["native", "reference", "reference", "reference"]


def test_without_compiled_code(monkeypatch):
    monkeypatch.setattr(native, "reason", lambda target: "no compiler was found")
    given = leaves(sum(map(list, zip(attention_graphs()[1])), [attention_graphs()[0]]))
    (capacity,) = leaves([torch.rand(2, 5, 5)])
    with cvg.trace_backends() as ran:
        flow = cvg.subgraph_max_flow(given[0], given[1:], sink="frame").flow
        grads = torch.autograd.grad(flow.square().sum(), given)
        cvg.max_flow(capacity, 0, 1).flow.sum().backward()
    assert ran == [("max_flow", "reference"), ("max_flow_backward", "reference"), ("max_flow", "reference")]
    flow = cvg.subgraph_max_flow(given[0], given[1:], sink="frame", backend="reference").flow
    for grad, wanted in zip(grads, torch.autograd.grad(flow.square().sum(), given), strict=True):
        torch.testing.assert_close(grad, wanted)
    with pytest.raises(cvg.BackendUnavailableError, match="'native'.*no compiler was found"):
        cvg.max_flow(capacity, 0, 1, backend="native")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_capacity(backend, value):
    cross, temporal = attention_graphs(2, 3, 4, 2)
    capacity = torch.rand(5, 6, 6)
    cross[1, 2, 3, 0] = value
    with pytest.raises(cvg.ArgumentError, match=r"cross must hold .* at \[1, 2, 3, 0\]"):
        cvg.subgraph_max_flow(*_moved(backend, cross, temporal), backend=backend)
    cross[1, 2, 3, 0] = 0.1
    temporal[1][0, 1, 2, 3] = value
    with pytest.raises(cvg.ArgumentError, match=r"temporal\[1\] must hold .* at \[0, 1, 2, 3\]"):
        cvg.subgraph_max_flow(*_moved(backend, cross, temporal), sink="frame", backend=backend)
    capacity[3, 4, 4] = value
    with pytest.raises(cvg.ArgumentError, match=r"capacity must hold .* at \[3, 4, 4\]"):
        cvg.max_flow(on(backend, capacity), 0, 1, backend=backend)


def _moved(backend, cross, temporal):
    return on(backend, cross), [on(backend, hop) for hop in temporal]


GOOD_CROSS, GOOD_HOP = torch.rand(1, 2, 3, 4), torch.rand(1, 4, 3, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cross": GOOD_CROSS[0]}, r"cross must be float32 or float64 \[B, K, F, L\]"),
        ({"cross": GOOD_CROSS.half()}, r"cross must be .* got torch.float16"),
        ({"cross": [1.0]}, r"cross must be float32 or float64 .* got list"),
        ({"cross": torch.rand(1, 2, 0, 4)}, "cross must have at least one frame"),
        ({"temporal": [GOOD_HOP, GOOD_HOP[:, :3]]}, r"temporal\[1\] must have shape"),
        ({"temporal": [GOOD_HOP.double()]}, r"temporal\[0\] must have the dtype"),
        ({"residual": "mean"}, "residual must be 'average', 'add' or None, got 'mean'"),
        ({"sink": "frames"}, "sink must be 'video' or 'frame', got 'frames'"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"temporal": 17 * [GOOD_HOP], "backend": "native"}, "hops 17 is not supported .* takes hops 0 to 16"),
    ],
)
def test_refused_subgraphs(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.subgraph_max_flow(**{"cross": GOOD_CROSS, "temporal": [GOOD_HOP], **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"capacity": torch.rand(4, 4)}, r"capacity must be float32 or float64 \[G, n, n\]"),
        ({"capacity": torch.rand(2, 3, 4)}, "capacity must be square"),
        ({"capacity": torch.rand(2, 1, 1)}, "n ≥ 2"),
        ({"capacity": torch.ones(2, 3, 3, dtype=torch.int64)}, "got torch.int64"),
        ({"source": 4}, r"source must be a node in \[0, 4\), got 4"),
        ({"sink": -1}, "sink must be a node"),
        ({"sink": True}, r"sink must be a node in \[0, 4\), got True"),
        ({"sink": 0}, "source and sink must differ"),
        ({"capacity": torch.rand(1, 65, 65), "backend": "native"}, "frames .or nodes. 65 is not supported"),
    ],
)
def test_refused_graphs(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.max_flow(**{"capacity": torch.rand(2, 4, 4), "source": 0, "sink": 1, **change})


def test_cuda_wants_a_gpu():
    with pytest.raises(cvg.BackendUnavailableError, match="'cuda' cannot run max_flow"):
        cvg.max_flow(torch.rand(1, 3, 3), 0, 1, backend="cuda")
