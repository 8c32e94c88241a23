"""attention_with_capture and capture_maps on every backend, against float64, forward and every gradient."""

from __future__ import annotations

import pytest
import torch

import cvg_kernels as cvg
from tests.ops.attentions import CASES, LONG, Case, check_attention, exact_attention, tensors
from tests.ops.backends import DEVICE, backends, device_of
from tests.tolerance import relative_error

BACKENDS = backends("attention", "reference", "native", "triton")


@pytest.mark.parametrize("head_reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(35)
def test_forward_and_gradients_float32(backend, case, head_reduction):
    check_attention(backend, case, torch.float32, head_reduction, map_bound=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[11], CASES[14]], ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(3)
def test_low_precision(backend, case, dtype):
    check_attention(backend, case, dtype, "mean", map_bound=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", backends("attention", "native"))
def test_long_keys(backend, dtype):
    check_attention(backend, LONG, dtype, "mean", map_bound=2e-6 if dtype == torch.float32 else 5e-6)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone(backend):
    """A gradient from one output only, to one input only, is that of the float64 definition."""
    case = Case("alone", 2, 3, 19, 37, 24, 24, [5, 5, 36])
    device = device_of(backend)
    inputs = tensors(case, torch.float32, device)
    exact_leaves, exact, _ = exact_attention(case, *inputs, None, True)
    for which in range(3):
        cotangent = torch.randn(exact[which].shape, device=device)
        wanted = torch.autograd.grad(
            exact[which], exact_leaves, cotangent.double(), retain_graph=True, allow_unused=True
        )
        for wrt in range(3):
            given = [t.detach().requires_grad_(i == wrt) for i, t in enumerate(inputs)]
            got = cvg.attention_with_capture(*given, case.tokens, backend=backend)[which]
            if wanted[wrt] is None:
                if got.requires_grad:
                    (grad,) = torch.autograd.grad(got, given[wrt], cotangent, allow_unused=True)
                    assert grad is None or (grad == 0).all()
                continue
            (grad,) = torch.autograd.grad(got, given[wrt], cotangent)
            torch.testing.assert_close(grad.double(), wanted[wrt], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_reduction", ["mean", "none"])
@pytest.mark.drawn(8, of="long tests")
def test_maps_alone_equal_maps_with_values(backend, head_reduction):
    case = CASES[0]
    query, key, value = tensors(case, torch.float32, device_of(backend))
    query.requires_grad_()
    options = {"head_reduction": head_reduction, "backend": backend}
    with_values = cvg.attention_with_capture(query, key, value, case.tokens, **options)
    alone = cvg.capture_maps(query, key, case.tokens, **options)
    torch.testing.assert_close(alone.maps, with_values.maps, rtol=1e-6, atol=1e-8)
    cotangent = torch.randn_like(alone.maps)
    (one,) = torch.autograd.grad(alone.maps, query, cotangent)
    (other,) = torch.autograd.grad(with_values.maps, query, cotangent)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_ids_per_sample(backend):
    case = Case("per-sample", 3, 2, 11, 17, 8, 8, [0])
    query, key, value = tensors(case, torch.float32, device_of(backend))
    ids = torch.randint(17, (3, 4))
    together = cvg.attention_with_capture(query, key, value, ids.to(query.device), backend=backend)
    for b in range(3):
        part = slice(b, b + 1)
        alone = cvg.attention_with_capture(query[part], key[part], value[part], ids[b].tolist(), backend=backend)
        torch.testing.assert_close(together.maps[part], alone.maps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch,queries", [(0, 4), (2, 0)], ids=["no-sample", "no-query"])
def test_empty(backend, batch, queries):
    options = {"requires_grad": True, "device": device_of(backend)}
    query = torch.randn(batch, 2, queries, 8, **options)
    key, value = (torch.randn(batch, 2, 5, 8, **options) for _ in range(2))
    result = cvg.attention_with_capture(query, key, value, [1, 2], backend=backend)
    assert result.out.shape == (batch, 2, queries, 8)
    assert result.maps.shape == (batch, 2, queries)
    assert result.lse.shape == (batch, 2, queries)
    grads = torch.autograd.grad(result.out.sum() + result.maps.sum(), (query, key, value))
    for grad, tensor in zip(grads, (query, key, value), strict=True):
        assert grad.shape == tensor.shape and (grad == 0).all()


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("backend", backends("attention", "reference", "native"))
def test_gradcheck(backend):
    query, key, value = (torch.randn(2, 2, n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 6, 6))
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, True]])

    def attend(query, key, value):
        return tuple(
            cvg.attention_with_capture(
                query, key, value, [2, 1, 1], key_mask=mask, backend=backend, head_reduction="none"
            )
        )

    assert torch.autograd.gradcheck(attend, (query, key, value))
    assert torch.autograd.gradcheck(
        lambda query, key: cvg.capture_maps(query, key, [2], backend=backend).maps, (query, key)
    )


def test_second_derivative_of_the_reference():
    inputs = [torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 4, 4)]

    def attend(*inputs):
        return tuple(cvg.attention_with_capture(*inputs, [1, 3], backend="reference"))

    assert torch.autograd.gradgradcheck(attend, inputs)


def assert_close_to_definition(backend, inputs, ids, mask=None, **options):
    """Outputs and gradients in float32 next to those of the definition in float64."""
    given = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found = cvg.attention_with_capture(*given, ids, key_mask=mask, backend=backend, **options)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wanted = cvg.attention_with_capture(*exact, ids, key_mask=wide, backend="reference", **options)
    cotangents = [torch.randn_like(t) for t in found]
    grads = torch.autograd.grad(found, given, cotangents)
    right = torch.autograd.grad(wanted, exact, [c.double() for c in cotangents])
    for actual, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual.double(), true, rtol=1e-5, atol=2e-5)
    for actual, true in zip(grads, right, strict=True):
        assert relative_error(actual, true) <= 5e-5


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(backend, scale):
    inputs = [torch.randn(1, 2, n, 8, device=device_of(backend)) for n in (18, 21, 21)]
    assert_close_to_definition(backend, inputs, [0, 20], scale=scale)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [-1e4, torch.finfo(torch.float32).min, 1e4])
def test_masks_of_large_numbers(backend, level):
    """A constant on every key of a sample changes nothing but the log-sum-exp; on some keys it hides them."""
    device = device_of(backend)
    inputs = [torch.randn(3, 2, n, 8, device=device) for n in (18, 21, 21)]
    mask = torch.zeros(3, 1, 1, 21, device=device)
    mask[0] = level
    mask[1, ..., 4:] = -abs(level)
    assert_close_to_definition(backend, inputs, [0, 20], mask)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_gradients_arrive_in_any_layout(backend, layout):
    device = device_of(backend)
    inputs = [torch.randn(2, 3, n, 8, device=device, requires_grad=True) for n in (18, 21, 21)]
    found = cvg.attention_with_capture(*inputs, [0, 20], head_reduction="none", backend=backend)
    if layout == "expanded":  # what sum() sends back
        cotangents = [torch.ones((), device=device).expand(t.shape) for t in found]
    else:
        cotangents = [torch.randn_like(t.mT.contiguous()).mT for t in found[:2]]
        cotangents.append(torch.randn(*found.lse.shape[::-1], device=device).permute(2, 1, 0))
    grads = torch.autograd.grad(found, inputs, cotangents, retain_graph=True)
    plain = torch.autograd.grad(found, inputs, [c.contiguous() for c in cotangents])
    for one, other in zip(grads, plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [21, 700], ids=["one-tile", "several-tiles"])
def test_not_a_number_stays_one(backend, keys):
    """A query of NaN must not pass for a row whose keys are all masked; its neighbours know nothing of it."""
    if backend == "triton" and keys > 100 and DEVICE.type == "cpu":
        keys = 100  # the interpreter is slow
    query, key, value = (torch.randn(1, 2, n, 8, device=device_of(backend)) for n in (18, keys, keys))
    query[0, 1, 3, 2] = torch.nan
    query.requires_grad_()
    found = cvg.attention_with_capture(query, key, value, [0, keys - 1], head_reduction="none", backend=backend)
    grads = torch.autograd.grad(found, query, [torch.ones_like(t) for t in found])
    for tensor in (found.out, found.maps.mT, found.lse[..., None], *grads):
        lost = tensor.isnan()
        assert lost[0, 1, 3].all() and lost.sum() == tensor.shape[-1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_alone_never_read_the_values(backend):
    """With values of NaN, a gradient through the maps is that of `capture_maps`: no work is done for `out`."""
    device = device_of(backend)
    query, key = (torch.randn(2, 2, n, 8, device=device, requires_grad=True) for n in (18, 21))
    value = torch.full((2, 2, 21, 8), torch.nan, device=device, requires_grad=True)
    found = cvg.attention_with_capture(query, key, value, [0, 20], backend=backend)
    cotangent = torch.randn_like(found.maps)
    *grads, none = torch.autograd.grad(found.maps, (query, key, value), cotangent, allow_unused=True)
    alone = cvg.capture_maps(query, key, [0, 20], backend=backend)
    wanted = torch.autograd.grad(alone.maps, (query, key), cotangent)
    assert none is None
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other)
