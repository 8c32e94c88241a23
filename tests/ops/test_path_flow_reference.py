"""Min-max path flow: against every path there is, and the soft form against its bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import cvg_kernels as cvg


def widest_paths(cross, temporal, residual):
    """Flow by enumerating every path token → frame → … → frame, in float64 Python numbers."""
    batch, tokens, frames, positions = cross.shape
    flow = torch.zeros_like(cross)
    for b, k, last, place in itertools.product(range(batch), range(tokens), range(frames), range(positions)):
        best = 0.0
        for path in itertools.product(range(frames), repeat=len(temporal)):
            stops = (*path, last)
            width = cross[b, k, stops[0], place].item()
            for hop, (come, go) in zip(temporal, itertools.pairwise(stops), strict=True):
                edge = hop[b, place, go, come].item() + (residual is not None and come == go)
                width = min(width, edge / 2 if residual == "average" else edge)
            best = max(best, width)
        flow[b, k, last, place] = best
    return flow


def graph(batch=2, tokens=3, frames=4, positions=2, hops=2, dtype=torch.float64):
    cross = torch.rand(batch, tokens, frames, positions, dtype=dtype)
    temporal = [torch.randn(batch, positions, frames, frames, dtype=dtype).softmax(-1) for _ in range(hops)]
    return cross, temporal


@pytest.mark.parametrize("hops", [0, 1, 2, 3])
@pytest.mark.parametrize("residual", ["average", "add", None])
def test_hard_flow_is_the_widest_path(hops, residual):
    cross, temporal = graph(hops=hops)
    with cvg.trace_backends() as ran:
        flow = cvg.path_flow(cross, temporal, residual=residual, backend="reference")
    assert ran == [("path_flow", "reference")]
    assert torch.equal(flow, widest_paths(cross, temporal, residual))


@pytest.mark.parametrize("temperature", [0.3, 0.01, 1e-3, 1e-4])
@pytest.mark.parametrize("hops", [1, 2])
def test_soft_flow_stays_within_its_bound(temperature, hops):
    cross, temporal = graph(frames=6, hops=hops)
    hard = cvg.path_flow(cross, temporal)
    soft = cvg.path_flow(cross, temporal, temperature=temperature)
    bound = temperature * hops * (math.log(6) + math.log(2))
    assert (soft - hard).abs().max() <= bound
    assert torch.isfinite(cvg.path_flow(cross.float(), [t.float() for t in temporal], temperature=temperature)).all()


def test_corrected_bias():
    """Edges close against T come closer, and the bound holds for any.

    Of equal edges nothing is wrong, and neither flow moves by more than an edge does: edges that lie within d of each
    other, so within d/2 of their middle, have flows that differ by d at most.
    """
    cross, temporal = graph(frames=6, hops=2)
    hard = cvg.path_flow(cross, temporal)
    corrected = cvg.path_flow(cross, temporal, temperature=0.1, correct_bias=True)
    flat = [hop / 100 for hop in (cross, *temporal)]
    apart = max(hop.max() for hop in flat) - min(hop.min() for hop in flat)
    flat_hard, flat_soft, flat_corrected = (
        cvg.path_flow(flat[0], flat[1:], residual=None, **options)
        for options in ({}, {"temperature": 0.1}, {"temperature": 0.1, "correct_bias": True})
    )
    assert (flat_corrected - flat_hard).abs().max() <= apart < (flat_soft - flat_hard).abs().max()
    assert (hard - corrected).max() <= 0.1 * 2 * math.log(6)
    assert (corrected - hard).max() <= 0.1 * 2 * math.log(2)
    assert torch.equal(cvg.path_flow(cross, temporal, correct_bias=True), hard)


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_gradients(temperature):
    cross, temporal = graph(batch=1, tokens=2, frames=3, positions=1)
    inputs = [t.requires_grad_() for t in (cross, *temporal)]

    def flow(cross, *temporal):
        return cvg.path_flow(cross, temporal, temperature=temperature, backend="reference")

    assert torch.autograd.gradcheck(flow, inputs)
    if temperature is not None:
        assert torch.autograd.gradgradcheck(flow, inputs)


def test_gradient_of_the_hard_form_goes_to_the_bottleneck():
    """One edge limits the flow; its gradient is one, halved by the averaged residual."""
    cross = torch.tensor([[[[0.9]], [[0.1]]]]).transpose(1, 2).reshape(1, 1, 2, 1).requires_grad_()
    hop = torch.tensor([[[[0.2, 0.8], [0.6, 0.4]]]]).requires_grad_()
    flow = cvg.path_flow(cross, [hop])
    torch.testing.assert_close(flow.detach().flatten(), torch.tensor([0.6, 0.3]))
    (to_hop,) = torch.autograd.grad(flow[..., 1, :].sum(), hop)
    torch.testing.assert_close(to_hop, torch.tensor([[[[0.0, 0.0], [0.5, 0.0]]]]))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 1, 1, 1), (2, 1, 1, 3)])
def test_small_and_empty(shape):
    batch, _, frames, positions = shape
    cross = torch.rand(shape)
    hop = torch.rand(batch, positions, frames, frames)
    for temperature in (None, 0.01):
        flow = cvg.path_flow(cross, [hop], temperature=temperature)
        assert flow.shape == shape
        if frames == 1:  # the one path there is; a soft minimum of two lies at most T ln 2 below it
            narrowest = torch.minimum(cross, ((hop + 1) / 2).mT.reshape(batch, 1, 1, positions))
            torch.testing.assert_close(flow, narrowest, rtol=1e-6, atol=0.7 * (temperature or 0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cross": torch.rand(2, 3, 4)}, r"cross must be floating point \[B, K, F, L\]"),
        ({"temporal": [torch.rand(1, 5, 4, 3)]}, r"temporal\[0\] must have shape \[B, L, F, F\] = \(1, 5, 4, 4\)"),
        ({"temporal": [torch.rand(1, 5, 4, 4).double()]}, r"temporal\[0\] must have the dtype and device"),
        ({"temperature": 0.0}, "temperature must be None or positive, got 0.0"),
        ({"cross": torch.rand(1, 2, 0, 5), "temporal": []}, "at least one frame"),
        ({"residual": "mean"}, "residual must be 'average', 'add' or None, got 'mean'"),
        ({"backend": "slow"}, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(change, message):
    good = {"cross": torch.rand(1, 2, 4, 5), "temporal": [torch.rand(1, 5, 4, 4)]}
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.path_flow(**(good | change))


def test_backends_say_why_not():
    with pytest.raises(cvg.BackendUnavailableError, match="path_flow has no cuda kernel"):
        cvg.path_flow(torch.rand(1, 2, 4, 5), [], backend="cuda")
    half = torch.rand(1, 2, 4, 5).half()
    with pytest.raises(cvg.ArgumentError, match="path_flow in dtype torch.float16 is not supported"):
        cvg.path_flow(half, [], backend="native")
    with cvg.trace_backends() as ran:
        assert cvg.path_flow(half, []).dtype == torch.float16
    assert ran == [("path_flow", "reference")]
