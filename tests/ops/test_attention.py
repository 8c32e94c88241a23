"""attention_with_capture and capture_maps on every backend, against float64, forward and every gradient."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cvg_kernels as cvg
from cvg_kernels.reference import attention as reference
from tests.ops.backends import DEVICE, backends, device_of
from tests.tolerance import assert_as_exact_as, assert_maps_exact, relative_error

BACKENDS = backends("attention", "reference", "native", "triton")


class Case(NamedTuple):
    """Sizes, as in the issue's contract, and the unusual thing about them."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    tokens: list[int]
    mask: str = "none"  # "bool", "additive", "rows" (one sample has no key at all)
    layout: str = "plain"  # "transposed", "expanded", "sliced"


CASES = [
    Case("cross-77", 2, 3, 45, 77, 40, 40, [1, 5, 76]),
    Case("one-of-everything", 1, 1, 1, 1, 1, 1, [0]),
    Case("one-query", 2, 2, 1, 19, 8, 8, [3]),
    Case("one-key", 2, 2, 21, 1, 16, 16, [0, 0]),
    Case("all-keys-captured", 1, 2, 9, 13, 4, 4, list(range(13))),
    Case("twice-the-same", 1, 2, 18, 33, 12, 12, [7, 7, 2]),
    Case("values-wider", 1, 2, 20, 24, 16, 48, [0, 23]),
    Case("values-narrower", 1, 2, 20, 24, 48, 5, [0, 23]),
    Case("head-dim-256", 1, 1, 17, 35, 256, 256, [34]),
    Case("head-dim-160", 1, 2, 17, 35, 160, 160, [34]),
    Case("head-dim-80", 1, 1, 40, 64, 80, 80, [0, 8]),
    Case("bool-mask", 3, 2, 30, 50, 24, 24, [0, 49], mask="bool"),
    Case("additive-mask", 2, 2, 30, 50, 32, 32, [0, 49], mask="additive"),
    Case("sample-without-keys", 2, 2, 10, 12, 16, 16, [4], mask="rows"),
    Case("heads-last", 2, 4, 33, 65, 64, 64, [9, 10], layout="transposed"),
    Case("expanded", 2, 4, 16, 20, 16, 16, [9], layout="expanded"),
    Case("every-other-dim", 1, 2, 16, 20, 10, 10, [9], layout="sliced"),
]
LONG = Case("long-keys", 1, 2, 130, 1500, 64, 64, [0, 700, 1499])
IDS = [case.name for case in CASES]


def tensors(case: Case, dtype: torch.dtype, device: torch.device = DEVICE):
    """Random query, key and value with the case's layout."""

    def make(length: int, dim: int) -> torch.Tensor:
        if case.layout == "transposed":
            made = torch.randn(case.batch, length, case.heads, dim).transpose(1, 2)
        elif case.layout == "expanded":
            made = torch.randn(case.batch, 1, length, dim).expand(-1, case.heads, -1, -1)
        elif case.layout == "sliced":
            made = torch.randn(case.batch, case.heads, length, 2 * dim)[..., ::2]
        else:
            made = torch.randn(case.batch, case.heads, length, dim)
        return made.to(device, dtype)

    return make(case.queries, case.dim), make(case.keys, case.dim), make(case.keys, case.value_dim)


def key_mask(case: Case, device: torch.device = DEVICE) -> torch.Tensor | None:
    if case.mask == "none":
        return None
    seen = torch.rand(case.batch, case.keys) < 0.6
    seen[:, case.tokens[0]] = True
    if case.mask == "rows":
        seen[0] = False
    if case.mask == "additive":
        return (3 * torch.randn(case.batch, 1, 1, case.keys)).to(device)
    return seen.to(device)


def additive(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Any mask as the float64 reference takes it."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.double()
    empty = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    return empty.masked_fill(~mask, -torch.inf)[:, None, None]


def exact_attention(case, query, key, value, mask, head_mean):
    """The definition in float64 on the very same (rounded) inputs; leaves for gradients included."""
    leaves = [t.detach().double().requires_grad_() for t in (query, key, value)]
    ids = torch.tensor(case.tokens, device=query.device).expand(case.batch, -1)
    options = {"scale": case.dim**-0.5, "mask": additive(mask)}
    outputs = reference.attention_with_capture(*leaves, ids, head_mean=head_mean, **options)[:3]
    weights = reference.probabilities(*leaves[:2], **options).weights
    peak = weights.detach().amax(-1)  # [B, H, N]
    return leaves, outputs, peak.mean(1) if head_mean else peak


def stock_attention(query, key, value, mask):
    """PyTorch's own attention in the input's dtype; a sample without keys is taken out by the caller."""
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    bias = None if mask is None else additive(mask).to(query.dtype)
    return leaves, scaled_dot_product_attention(*leaves, attn_mask=bias)


@pytest.mark.parametrize("head_reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(35)
def test_forward_and_gradients_float32(backend, case, head_reduction):
    check(backend, case, torch.float32, head_reduction, map_bound=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[11], CASES[14]], ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(3)
def test_low_precision(backend, case, dtype):
    check(backend, case, dtype, "mean", map_bound=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", backends("attention", "native"))
def test_long_keys(backend, dtype):
    check(backend, LONG, dtype, "mean", map_bound=2e-6 if dtype == torch.float32 else 5e-6)


def check(backend, case, dtype, head_reduction, map_bound):
    """Forward and all three gradients, from all three outputs at once, within the error budget."""
    device = device_of(backend)
    query, key, value = tensors(case, dtype, device)
    mask = key_mask(case, device)
    head_mean = head_reduction == "mean"
    given = [t.detach().requires_grad_() for t in (query, key, value)]
    with cvg.trace_backends() as ran:
        out, maps, lse = cvg.attention_with_capture(
            *given, case.tokens, key_mask=mask, head_reduction=head_reduction, backend=backend
        )
    assert ran == [("attention", backend)]
    exact_leaves, (exact_out, exact_maps, exact_lse), peak = exact_attention(case, query, key, value, mask, head_mean)
    assert out.dtype == dtype and maps.dtype == torch.float32 and lse.dtype == torch.float32
    assert_maps_exact(maps.detach(), exact_maps.detach(), peak, map_bound)
    seen = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    assert_as_exact_as(lse[seen].detach(), exact_lse[seen].float().detach(), exact_lse[seen].detach(), 8)

    # Gradients that reach the outputs, and what stock attention makes of the part it knows, dO.
    grad_out = torch.randn_like(out)
    grad_maps = torch.randn_like(maps)
    grad_lse = torch.randn_like(lse) * seen
    cotangents = [grad_out, grad_maps, grad_lse]
    grads = torch.autograd.grad([out, maps, lse], given, cotangents, retain_graph=True)
    exact_grads = torch.autograd.grad(
        [exact_out, exact_maps, exact_lse],
        exact_leaves,
        [grad_out.double(), grad_maps.double(), grad_lse.double()],
        retain_graph=True,
    )
    if mask is not None and mask.dtype == torch.bool and not mask.any(-1).all():
        dead = ~mask.any(-1)
        for tensor in (out, maps, grads[0], grads[1], grads[2]):
            assert (tensor[dead] == 0).all()
        for tensor, exact in zip((out, *grads), (exact_out, *exact_grads), strict=True):
            torch.testing.assert_close(tensor.double(), exact, rtol=1e-4, atol=1e-5)
        return
    stock_leaves, stock_out = stock_attention(query, key, value, mask)
    depth = max(case.keys, case.dim, case.queries, 32)  # dP − δ of few keys cancels
    assert_as_exact_as(out.detach(), stock_out.detach(), exact_out.detach(), depth=depth)
    # The stock path has no maps: its budget for their gradient is that of an eager float32 computation.
    wide = [t.detach().float().requires_grad_() for t in stock_leaves]
    ids = torch.tensor(case.tokens, device=device).expand(case.batch, -1)
    bias = None if mask is None else additive(mask).float()
    eager = reference.attention_with_capture(*wide, ids, scale=case.dim**-0.5, mask=bias, head_mean=head_mean)
    from_maps = torch.autograd.grad(eager[1:3], wide[:2], [grad_maps, grad_lse])
    from_out = torch.autograd.grad(stock_out, stock_leaves, grad_out)
    stock = [from_out[0].float() + from_maps[0], from_out[1].float() + from_maps[1], from_out[2]]
    # For tensor cores dS is rounded to 16 bit, with all three gradients that flow into it; the budget rounds dO's
    # only.
    factor = 2.5 if backend == "triton" and dtype != torch.float32 else 1.5
    size = 0.0
    if case.keys == 1:  # P = 1: dP − δ cancels but for dlse, and dP k is what rounding is measured by
        terms = (grad_out, value, query, key)
        longest = [t.detach().double().norm(dim=-1).max().item() for t in terms]
        size = case.dim**-0.5 * longest[0] * longest[1] * max(longest[2:])
    for found, plain, exact in zip(grads, stock, exact_grads, strict=True):
        assert_as_exact_as(found, plain, exact, factor, depth=depth, size=size)

    # What stock attention does too, the gradient of its output, is held to the stock path's own error.
    alone = torch.autograd.grad(out, given, grad_out)
    exact_alone = torch.autograd.grad(exact_out, exact_leaves, grad_out.double())
    for found, plain, exact in zip(alone, from_out, exact_alone, strict=True):
        assert_as_exact_as(found, plain, exact, depth=depth, size=size)


@pytest.mark.drawn(2)
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
@pytest.mark.drawn(2)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_any_scale(backend, scale):
    inputs = [torch.randn(1, 2, n, 8, device=device_of(backend)) for n in (18, 21, 21)]
    assert_close_to_definition(backend, inputs, [0, 20], scale=scale)


@pytest.mark.drawn(2)
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


@pytest.mark.drawn(2)
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
