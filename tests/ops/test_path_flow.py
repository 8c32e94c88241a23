"""Path flow on every backend, against the definition in float64: forward and every gradient, in both orders."""

from __future__ import annotations

import pytest
import torch
from cvg_kernels.reference.min_max_matmul import min_max_matmul
from torch.library import opcheck

import cvg_kernels as cvg
from cvg_kernels.reference import path_flow as reference
from tests.ops.backends import backends, device_of
from tests.ops.path_flows import assert_like_the_reference, graph, results

BACKENDS = backends("path_flow")
KERNELS = [backend for backend in BACKENDS if backend.values[0] != "reference"]
ORDERS = ["tokens_first", "hops_first"]

#: batch, tokens, frames, positions, hops
SIZES = [(2, 3, 4, 5, 2), (1, 1, 1, 1, 1), (1, 5, 3, 4, 0), (1, 19, 16, 17, 2), (1, 2, 21, 3, 1), (2, 2, 5, 2, 3)]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("temperature", [None, 0.5, 0.01, 1e-3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.drawn(12)
def test_path_flow(backend, temperature, sizes):
    residual = ("average", "add", None)[sum(sizes) % 3]
    tensors = graph(sizes, device=device_of(backend))

    def kernel(cross, *temporal):
        return cvg.path_flow(cross, temporal, temperature=temperature, residual=residual, backend=backend)

    def definition(cross, *temporal):
        return reference.path_flow(cross, temporal, temperature=temperature, residual=residual)

    with cvg.trace_backends() as ran:
        assert_like_the_reference(kernel, definition, tensors, torch.randn_like(tensors[0]), temperature)
    assert ran[0] == ("path_flow", backend)
    if temperature is None:
        assert torch.equal(kernel(*tensors), definition(*tensors))


@pytest.mark.drawn(6)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [None, 0.05])
def test_spatial_hop(backend, temperature):
    """From position to position inside a frame, before the temporal hops."""
    cross, hop = graph((2, 3, 4, 6, 1), device=device_of(backend))
    spatial = torch.randn(2, 4, 6, 6, device=cross.device).softmax(-1)

    def kernel(cross, hop, spatial):
        return cvg.path_flow(cross, [hop], spatial=spatial, temperature=temperature, backend=backend)

    def by_frames(cross, hop, spatial):
        inside = torch.stack(
            [
                min_max_matmul((spatial[:, f] + torch.eye(6).to(spatial)) / 2, cross[:, :, f].mT, temperature)
                for f in range(4)
            ],
            1,
        )  # fmt: skip  [B, F, L, K]
        return reference.path_flow(inside.permute(0, 3, 1, 2), [hop], temperature=temperature)

    grad = torch.randn_like(cross)
    assert_like_the_reference(kernel, by_frames, [cross, hop, spatial], grad, temperature)
    with pytest.raises(cvg.ArgumentError, match=r"spatial must be torch.float32 with shape"):
        kernel(cross, hop, spatial[:, :1])


@pytest.mark.drawn(6)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("residual", ["average", "add", None])
def test_with_a_spatial_hop_and_corrected_bias(backend, residual, order):
    """The correction that waits to the end is the one after each product."""
    cross, *temporal, spatial = graph((2, 3, 5, 5, 4), device=device_of(backend))
    options = {"temperature": 0.1, "residual": residual, "correct_bias": True, "order": order}

    def kernel(cross, spatial, *temporal):
        return cvg.path_flow(cross, temporal, spatial=spatial, backend=backend, **options)

    def definition(cross, spatial, *temporal):
        return reference.path_flow(cross, temporal, spatial=spatial, **options)

    tensors = [cross, spatial, *temporal]
    assert_like_the_reference(kernel, definition, tensors, torch.randn_like(cross), 0.1)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("temperature", [1e-4, 3e-5])
def test_cold_soft_flow_is_the_hard_one(backend, temperature):
    """Where e^(1/T) is far beyond any float the soft form is within its bound of the hard one."""
    cross, *temporal = graph((1, 3, 8, 9, 2), device=device_of(backend))
    soft = cvg.path_flow(cross, temporal, temperature=temperature, backend=backend)
    hard = cvg.path_flow(cross, temporal, backend=backend)
    assert (soft - hard).abs().max() <= temperature * 2 * (8 * 2.0) ** 0.5 + 1e-6


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("temperature", [None, 0.02])
def test_huge_and_tiny_numbers(backend, temperature):
    """Capacities far apart, as an added residual and unnormalised maps make them."""
    tensors = graph((1, 4, 6, 7, 2), device=device_of(backend))
    tensors[0] = tensors[0] * 50
    tensors[1] = tensors[1] * 1e-6

    def kernel(cross, *temporal):
        return cvg.path_flow(cross, temporal, temperature=temperature, residual="add", backend=backend)

    def definition(cross, *temporal):
        return reference.path_flow(cross, temporal, temperature=temperature, residual="add")

    assert_like_the_reference(kernel, definition, tensors, torch.randn_like(tensors[0]), temperature)


@pytest.mark.parametrize("backend", KERNELS)
def test_ties_share_the_gradient_as_torch_shares_it(backend):
    """Numbers of a coarse grid: most widest paths tie, and so do the edges of many."""
    tensors = [(4 * tensor).round() / 4 for tensor in graph((2, 3, 5, 6, 2))]
    tensors = [tensor.to(device_of(backend)) for tensor in tensors]
    grad = torch.randn_like(tensors[0])
    found = results(lambda x, *t: cvg.path_flow(x, t, backend=backend), tensors, grad)
    exact = results(lambda x, *t: reference.path_flow(x, t), tensors, grad)
    for have, want in zip(found, exact, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("temperature", [None, 0.01])
@pytest.mark.drawn(6)
def test_sparse_gradients(backend, temperature):
    """A gradient at one output, as a maximum sends it, and none at all."""
    tensors = graph((2, 20, 6, 37, 2), device=device_of(backend))
    grad = torch.zeros_like(tensors[0])
    for at in (None, (1, 18, 3, 36)):
        if at is not None:
            grad[at] = 1.5
        found = results(lambda x, *t: cvg.path_flow(x, t, temperature=temperature, backend=backend), tensors, grad)
        exact = results(
            lambda x, *t: reference.path_flow(x, t, temperature=temperature),
            [tensor.double() for tensor in tensors],
            grad.double(),
        )
        for have, want in zip(found, exact, strict=True):
            torch.testing.assert_close(have.double(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("temperature", [None, 0.01])
def test_a_nan_among_zeros_of_a_gradient_is_not_lost(backend, temperature):
    """What passes over tiles without a gradient must not take NaN for none."""
    tensors = graph((1, 3, 9, 34, 1), device=device_of(backend))
    grad = torch.zeros_like(tensors[0])
    grad[0, 2, 7, 33] = torch.nan

    def kernel(cross, *temporal):
        return cvg.path_flow(cross, temporal, temperature=temperature, backend=backend)

    with cvg.trace_backends() as ran:
        _, grad_cross, grad_hop = results(kernel, tensors, grad)
    assert ran[0] == ("path_flow", backend)
    # The narrower of the two edges has the gradient.
    assert grad_cross[0, 2, :, 33].isnan().any() or grad_hop[0, 33, 7].isnan().any()
    assert not grad_cross[0, :2].isnan().any() and not grad_hop[0, :33].isnan().any()


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("temperature", [None, 0.01])
def test_any_strides(backend, temperature):
    """Views as capture makes them, and worse: the same numbers to the bit."""
    tensors = graph((2, 5, 4, 18, 2), device=device_of(backend))
    odd = [
        tensors[0].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        tensors[1].mT.contiguous().mT,
        tensors[2].repeat_interleave(2, -1)[..., ::2],
    ]
    assert not any(tensor.is_contiguous() for tensor in odd)

    def flow(x, *t):
        return cvg.path_flow(x, t, temperature=temperature, backend=backend)

    grad = torch.randn_like(tensors[0])
    for have, want in zip(
        results(flow, odd, grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)),
        results(flow, tensors, grad),
        strict=True,
    ):
        assert torch.equal(have, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [None, 0.01])
def test_a_nan_is_not_lost(backend, temperature):
    cross, *temporal = graph((1, 3, 4, 20, 2), device=device_of(backend))
    for broken in (0, 1, 2):
        tensors = [tensor.clone() for tensor in (cross, *temporal)]
        tensors[broken][0, 1, 2, 3] = torch.nan
        flow = cvg.path_flow(tensors[0], tensors[1:], temperature=temperature, backend=backend)
        wanted = reference.path_flow(tensors[0], tensors[1:], temperature=temperature)
        assert torch.equal(flow.isnan(), wanted.isnan()) and flow.isnan().any()


@pytest.mark.parametrize("backend", ["native"])
@pytest.mark.parametrize("temperature", [None, 0.3, 1e-3])
def test_gradcheck(backend, temperature):
    cvg.backends.require("path_flow", cvg.backends.Backend.NATIVE)
    tensors = [t.requires_grad_() for t in graph((1, 2, 3, 9, 2), torch.float64)]

    def flow(cross, *temporal):
        return cvg.path_flow(cross, temporal, temperature=temperature, backend=backend)

    assert torch.autograd.gradcheck(flow, tensors, eps=1e-8, atol=1e-4)
    (grad,) = torch.autograd.grad(flow(*tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), tensors[0])


def test_a_gradient_that_nobody_wants_is_not_asked_for():
    cross, first, second = graph((1, 2, 3, 9, 2))
    second.requires_grad_()
    flow = cvg.path_flow(cross, [first, second], temperature=0.01)
    (grad,) = torch.autograd.grad(flow.sum(), second)
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_registration():
    leaves = [tensor.requires_grad_() for tensor in graph((1, 2, 3, 9, 2))]
    opcheck(torch.ops.cvg_kernels.path_flow.default, (leaves[0], leaves[1:], 0.01, "average", "native"))


@pytest.mark.parametrize("order", ORDERS)
def test_compiled_without_a_break(order):
    tensors = graph((1, 2, 3, 9, 2))

    def flow(cross, first, second):
        return cvg.path_flow(cross, [first, second], temperature=0.01, order=order)

    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    grad = torch.randn_like(tensors[0])
    for have, want in zip(results(compiled, tensors, grad), results(flow, tensors, grad), strict=True):
        assert torch.equal(have, want)


# --- hops multiplied first: the same hard flow, the soft flow of Vico's released code --------------------------------

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


@pytest.mark.drawn(6)
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
def test_hops_first(backend, temperature, sizes):
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


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("temperature", [None, 0.3, 1e-2])
def test_gradcheck_of_hops_first(backend, temperature):
    cvg.backends.require("path_flow", cvg.Backend(backend))
    tensors = [t.requires_grad_() for t in graph((1, 2, 3, 9, 2), torch.float64)]

    def flow(cross, *temporal):
        return cvg.path_flow(cross, temporal, temperature=temperature, backend=backend, **FIRST)

    assert torch.autograd.gradcheck(flow, tensors, eps=1e-7, atol=1e-5)
    if backend == "reference" and temperature == 0.3:
        assert torch.autograd.gradgradcheck(flow, tensors, fast_mode=True)


def test_an_unknown_order_is_refused():
    cross, *temporal = graph((1, 2, 3, 4, 2))
    with pytest.raises(cvg.ArgumentError, match="order must be 'tokens_first' or 'hops_first'"):
        cvg.path_flow(cross, temporal, order="released")
