"""The min-max product on every backend, against the definition in float64: forward and both gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

import cvg_kernels as cvg
from cvg_kernels.reference import min_max_matmul as reference
from tests.ops.backends import backends, device_of
from tests.ops.path_flows import assert_like_the_reference, results

BACKENDS = backends("min_max_matmul")
KERNELS = [backend for backend in BACKENDS if backend.values[0] != "reference"]


def test_soft_minimum_of_equals():
    """softmin(a, a) = a − T ln 2, the bias that the definition has."""
    a = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    product = cvg.min_max_matmul(a, a, 0.01)
    torch.testing.assert_close(product, a - 0.01 * math.log(2))


def test_the_corrected_bias_leaves_equal_edges_as_they_are():
    same = torch.full((1, 5, 5), 0.5, dtype=torch.float64)
    torch.testing.assert_close(cvg.min_max_matmul(same, same, 0.1, correct_bias=True), same)


def test_hard_product_equals_an_eager_one_to_the_bit():
    a, b = torch.rand(3, 7, 5), torch.rand(3, 5, 6)
    eager = torch.stack([torch.minimum(a[:, :, r, None], b[:, None, r]) for r in range(5)]).amax(0)
    assert torch.equal(cvg.min_max_matmul(a, b), eager)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("temperature", [None, 0.3, 0.01])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 5, 6), (1, 40, 33, 21), (3, 9, 70, 35)])
@pytest.mark.drawn(8, of="long tests")
def test_min_max_matmul(backend, temperature, shape):
    batch, rows, depth, columns = shape
    device = device_of(backend)
    tensors = [torch.rand(batch, rows, depth, device=device), torch.rand(batch, depth, columns, device=device)]

    def kernel(a, b):
        return cvg.min_max_matmul(a, b, temperature, backend=backend)

    def definition(a, b):
        return reference.min_max_matmul(a, b, temperature)

    grad = torch.randn(batch, rows, columns, device=device)
    with cvg.trace_backends() as ran:
        assert_like_the_reference(kernel, definition, tensors, grad, temperature)
    assert ran[:2] == [("min_max_matmul", backend), ("min_max_matmul_backward", backend)]
    if temperature is None:
        assert torch.equal(kernel(*tensors), definition(*tensors))


@pytest.mark.parametrize("backend", KERNELS)
def test_ties_share_the_gradient_as_torch_shares_it(backend):
    """Numbers of a coarse grid: most widest paths tie, and so do the edges of many."""
    a, b = ((4 * torch.rand(2, 6, 6)).round().div(4).to(device_of(backend)) for _ in range(2))
    grad = torch.randn_like(a)
    found = results(lambda a, b: cvg.min_max_matmul(a, b, backend=backend), (a, b), grad)
    for have, want in zip(found, results(reference.min_max_matmul, (a, b), grad), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [None, 0.3, 1e-3])
def test_gradcheck(temperature):
    cvg.backends.require("min_max_matmul", cvg.Backend.NATIVE)
    factors = [torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 4, 5, dtype=torch.float64)]
    factors = [factor.requires_grad_() for factor in factors]

    def product(a, b):
        return cvg.min_max_matmul(a, b, temperature, backend="native")

    assert torch.autograd.gradcheck(product, factors, eps=1e-8, atol=1e-4)
    (grad,) = torch.autograd.grad(product(*factors).square().sum(), factors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), factors[0])


def test_registration():
    a, b = torch.rand(2, 3, 4), torch.rand(2, 4, 5)
    opcheck(torch.ops.cvg_kernels.min_max_matmul.default, (a.requires_grad_(), b.requires_grad_(), None, "native"))
    opcheck(
        torch.ops.cvg_kernels.min_max_matmul_backward.default,
        (torch.rand(2, 3, 5), a.detach(), b.detach(), None, True, False, "native"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_backends_say_why_not():
    a, b = torch.rand(1, 2, 3), torch.rand(1, 3, 4)
    with pytest.raises(cvg.BackendUnavailableError, match="min_max_matmul has no cuda kernel"):
        cvg.min_max_matmul(a, b, backend="cuda")
    with pytest.raises(cvg.ArgumentError, match="min_max_matmul in dtype torch.float16 is not supported"):
        cvg.min_max_matmul(a.half(), b.half(), backend="native")
