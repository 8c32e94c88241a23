"""Hops multiplied first: the same hard flow, the soft flow of Vico's released code, on every backend."""

from __future__ import annotations

import pytest
import torch

import cvg_kernels as cvg
from cvg_kernels.reference import path_flow as reference
from tests.ops.backends import backends, device_of
from tests.ops.path_flows import assert_like_the_reference, graph, results

BACKENDS = backends("path_flow")
KERNELS = [backend for backend in BACKENDS if backend.values[0] != "reference"]
FIRST = {"order": "hops_first"}


def released_product(a, b, temperature):
    """The soft product as the released code forms it: both factors spread to [..., m, n, k], k is summed over."""
    left, right = torch.broadcast_tensors(a[..., :, None, :], b.mT[..., None, :, :])
    narrow = -temperature * torch.stack([-left / temperature, -right / temperature]).logsumexp(0)
    return temperature * (narrow / temperature).logsumexp(-1)


@pytest.mark.parametrize("residual", ["average", "add"])
@pytest.mark.parametrize("temperature", [0.3, 0.01, 0.001])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] != "triton"])
def test_it_is_what_the_released_code_computes(backend, temperature, residual):
    """T_effect = T₂ ⊙ T₁ at every position, then T_effect ⊙ X, each hop with its skip connection."""
    cross, first, second = graph((2, 5, 6, 7, 2), torch.float64)
    skip = torch.eye(6, dtype=torch.float64)
    share = 0.5 if residual == "average" else 1.0
    effect = released_product(share * (second + skip), share * (first + skip), temperature)
    wanted = released_product(effect, cross.permute(0, 3, 2, 1), temperature).permute(0, 3, 2, 1)
    options = {"temperature": temperature, "residual": residual, "backend": backend}
    flow = cvg.path_flow(cross, [first, second], **options, **FIRST)
    torch.testing.assert_close(flow, wanted, rtol=1e-12, atol=1e-13)
    # Not what the other order gives: the soft product is not associative.
    other = cvg.path_flow(cross, [first, second], **options)
    assert (flow - other).abs().max() > 0.01 * temperature


@pytest.mark.drawn(2)
@pytest.mark.parametrize("hops", [0, 1, 2, 3])
@pytest.mark.parametrize("residual", ["average", "add", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hard_flow_is_the_same_to_the_bit(backend, residual, hops):
    cross, *temporal = graph((2, 3, 5, 9, hops), device=device_of(backend))
    options = {"residual": residual, "backend": backend}
    flow = cvg.path_flow(cross, temporal, **options, **FIRST)
    assert torch.equal(flow, cvg.path_flow(cross, temporal, **options))


@pytest.mark.parametrize("hops", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_up_to_one_hop_there_is_one_order(backend, hops):
    cross, *temporal = graph((2, 3, 5, 9, hops), device=device_of(backend))
    options = {"temperature": 0.05, "backend": backend}
    flow = cvg.path_flow(cross, temporal, **options, **FIRST)
    assert torch.equal(flow, cvg.path_flow(cross, temporal, **options))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("temperature", [None, 0.5, 0.01])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5, 2), (1, 1, 1, 1, 2), (1, 19, 16, 17, 2), (2, 2, 5, 2, 3)], ids=str)
@pytest.mark.drawn(12)
def test_kernels(backend, temperature, sizes):
    """Forward and every gradient, against the definition in float64."""
    options = {"temperature": temperature, "residual": ("average", "add", None)[sum(sizes) % 3]}
    tensors = graph(sizes, device=device_of(backend))

    def kernel(cross, *temporal):
        return cvg.path_flow(cross, temporal, backend=backend, **options, **FIRST)

    def definition(cross, *temporal):
        return reference.path_flow(cross, temporal, **options, **FIRST)

    with cvg.trace_backends() as ran:
        assert_like_the_reference(kernel, definition, tensors, torch.randn_like(tensors[0]), temperature)
    assert ran == [("path_flow", backend)] * 2 + [("path_flow_backward", backend)] * 2


@pytest.mark.drawn(3)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("residual", ["average", "add", None])
def test_with_a_spatial_hop_and_corrected_bias(backend, residual):
    cross, *temporal, spatial = graph((2, 3, 5, 5, 4), device=device_of(backend))
    options = {"temperature": 0.1, "residual": residual, "correct_bias": True, **FIRST}

    def kernel(cross, spatial, *temporal):
        return cvg.path_flow(cross, temporal, spatial=spatial, backend=backend, **options)

    def definition(cross, spatial, *temporal):
        return reference.path_flow(cross, temporal, spatial=spatial, **options)

    tensors = [cross, spatial, *temporal]
    assert_like_the_reference(kernel, definition, tensors, torch.randn_like(cross), 0.1)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("temperature", [None, 0.3, 1e-2])
def test_gradcheck(backend, temperature):
    cvg.backends.require("path_flow", cvg.Backend(backend))
    tensors = [t.requires_grad_() for t in graph((1, 2, 3, 9, 2), torch.float64)]

    def flow(cross, *temporal):
        return cvg.path_flow(cross, temporal, temperature=temperature, backend=backend, **FIRST)

    assert torch.autograd.gradcheck(flow, tensors, eps=1e-7, atol=1e-5)
    if backend == "reference" and temperature == 0.3:
        assert torch.autograd.gradgradcheck(flow, tensors, fast_mode=True)


def test_compiled_without_a_break():
    cross, *temporal = graph((1, 2, 3, 9, 2))

    def flow(cross, first, second):
        return cvg.path_flow(cross, [first, second], temperature=0.01, **FIRST)

    grad = torch.randn_like(cross)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for have, want in zip(
        results(compiled, [cross, *temporal], grad), results(flow, [cross, *temporal], grad), strict=True
    ):
        assert torch.equal(have, want)


def test_an_unknown_order_is_refused():
    cross, *temporal = graph((1, 2, 3, 4, 2))
    with pytest.raises(cvg.ArgumentError, match="order must be 'tokens_first' or 'hops_first'"):
        cvg.path_flow(cross, temporal, order="released")
