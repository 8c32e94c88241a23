"""temporal_attention on every backend, against float64, forward and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cvg_kernels as cvg
from tests.ops.backends import backends, device_of
from tests.ops.temporal import eager
from tests.ops.temporal_cases import TILED, Case, check, each_gradient_alone, regulariser, tensors

BACKENDS = backends("temporal_attention", "reference", "native", "triton")
EXACT = BACKENDS[:2]  # those that compute in float64


CASES = [
    Case("videocrafter", 6, 3, 16, 64, 64, layout="heads-last"),
    Case("animatediff", 5, 2, 16, 40, 40, layout="unet"),
    Case("plain", 3, 2, 16, 32, 32, added="none"),
    Case("one-of-everything", 1, 1, 1, 1, 1),
    Case("one-frame", 9, 2, 1, 24, 24),
    Case("two-frames", 40, 1, 2, 8, 8, sigma=0.5),
    Case("odd-sizes", 7, 3, 11, 13, 29),
    Case("odd-frames", 5, 2, 23, 80, 80, layout="heads-last"),
    Case("head-dim-128", 3, 1, 24, 128, 128),
    Case("values-narrow", 4, 2, 16, 48, 5),
    Case("bias", 5, 3, 16, 24, 24, added="bias"),
    Case("causal", 4, 2, 19, 24, 24, added="causal"),
    Case("every-other-dim", 4, 2, 16, 20, 20, layout="sliced"),
    Case("strong", 4, 2, 16, 32, 32, sigma=1.0, strength=3.0),
    Case("weakening", 4, 2, 16, 32, 32, strength=-0.5),
]
LONG = [
    Case("many-frames", 2, 2, 64, 64, 64, sigma=8.0, layout="heads-last"),
    Case("frames-65", 2, 1, 65, 20, 20),
    Case("frames-128", 1, 1, 128, 16, 16, sigma=12.0),
]
LARGE = [
    *LONG,
    Case("frames-256", 2, 1, 256, 32, 32, sigma=30.0),
    Case("head-dim-256", 2, 2, 16, 256, 256),
    Case("head-dim-160", 3, 2, 16, 160, 160, layout="unet"),
]
by_name = {"ids": lambda case: case.name if isinstance(case, Case) else None}


@pytest.mark.parametrize("case", CASES, **by_name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(6)
def test_forward_and_gradients_float32(backend, case):
    check(backend, case, torch.float32)


@pytest.mark.parametrize("case", LARGE, **by_name)
@pytest.mark.parametrize("backend", EXACT)
def test_beyond_the_gpu_kernels(backend, case):
    check(backend, case, torch.float32)


@pytest.mark.parametrize("case", LONG, **by_name)
@pytest.mark.parametrize("backend", BACKENDS + TILED)
def test_many_frames(backend, case):
    check(backend, case, torch.float16)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[6], CASES[13]], **by_name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, case, dtype):
    check(backend, case, dtype)


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_band_it_is_stock_attention(backend):
    given = tensors(CASES[0], torch.float32, device_of(backend))
    found = cvg.temporal_attention(*given, backend=backend)
    assert found.maps is None
    torch.testing.assert_close(found.out, scaled_dot_product_attention(*given))
    nothing = cvg.temporal_attention(*given, sigma=2.0, strength=0.0, backend=backend)
    torch.testing.assert_close(nothing.out, found.out)
    scaled = cvg.temporal_attention(*given, scale=0.3, backend=backend).out
    torch.testing.assert_close(scaled, scaled_dot_product_attention(*given, scale=0.3))


@pytest.mark.parametrize("sigma, limit", [(1e-3, "diagonal"), (1e-12, "diagonal"), (1e9, "flat"), (math.inf, "flat")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_of_sigma(backend, sigma, limit):
    """σ → 0 adds m on the diagonal alone; σ → ∞ adds m everywhere, which no softmax sees."""
    query, key, value = tensors(Case("", 3, 2, 9, 16, 16), torch.float32, device_of(backend))
    sigma = torch.tensor(sigma, device=query.device, requires_grad=True)
    found = cvg.temporal_attention(query, key, value, sigma=sigma, capture=True, backend=backend)
    scores = query @ key.mT / 4
    if limit == "diagonal":
        scores = scores + torch.diag_embed(scores.amax(-1))
    torch.testing.assert_close(found.out, scores.softmax(-1) @ value, rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(found.out.square().sum() + found.maps.square().sum(), sigma)
    assert torch.isfinite(grad) and grad.abs() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_maximum_lowers_the_diagonal(backend):
    """Where every logit of a row is negative the band works backwards, as in VSTAR's code."""
    query = torch.rand(3, 2, 8, 16, device=device_of(backend)) + 0.1
    key, value = -query.flip(-2), torch.randn_like(query)
    plain = cvg.temporal_attention(query, key, value, capture=True, backend=backend).maps
    banded = cvg.temporal_attention(query, key, value, sigma=1.0, capture=True, backend=backend)
    assert (banded.maps.diagonal(dim1=1, dim2=2) < plain.diagonal(dim1=1, dim2=2)).all()
    wanted, _ = eager(query, key, value, sigma=torch.tensor(1.0), strength=1.0)
    torch.testing.assert_close(banded.out, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_row_maximum_has_a_gradient(backend):
    """It is the difference between the true gradient and the one with m held fixed,
    and it goes to the first of a tie.
    """
    device = device_of(backend)
    query = torch.tensor([[1.0, 0.0]] * 4, device=device)[None, None].requires_grad_()
    key = torch.tensor([[0.5, 0.0], [2.0, 1.0], [2.0, -1.0], [0.0, 3.0]], device=device)
    key = key[None, None].requires_grad_()
    value = torch.randn(1, 1, 4, 3, device=device)

    def grads(row_max_grad, wanted=False):
        if not wanted:
            found = cvg.temporal_attention(
                query, key, value, sigma=1.0, scale=1.0, row_max_grad=row_max_grad, backend=backend
            )
            return torch.autograd.grad(found.out.square().sum(), (query, key))
        q, k, v = (t.detach().double().requires_grad_() for t in (query, key, value))
        s = q @ k.mT
        at = torch.arange(4, device=device)
        m = s[..., 1:2]  # the first of the two that tie
        m = m if row_max_grad else m.detach()
        s = s + m * (-(at[:, None] - at).square() / 2).double().exp()
        return torch.autograd.grad((s.softmax(-1) @ v).square().sum(), (q, k))

    for row_max_grad in (True, False):
        for found, right in zip(grads(row_max_grad), grads(row_max_grad, True), strict=True):
            torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)
    assert (grads(True)[0] - grads(False)[0]).abs().max() > 1e-2
    assert (grads(True)[1] - grads(False)[1])[0, 0, [0, 2, 3]].abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_keys(backend):
    """It gives 0 and takes no gradient; the others are as without it."""
    query, key, value = (
        t.requires_grad_() for t in tensors(Case("", 3, 2, 6, 16, 16), torch.float32, device_of(backend))
    )
    bias = torch.zeros(6, 6, device=query.device)
    bias[2], bias[:, 5] = -torch.inf, -torch.inf
    bias.requires_grad_()
    found = cvg.temporal_attention(query, key, value, bias=bias, capture=True, backend=backend)
    rest = [0, 1, 3, 4, 5]
    wanted = scaled_dot_product_attention(query[:, :, rest], key[:, :, :5], value[:, :, :5])
    torch.testing.assert_close(found.out[:, :, rest], wanted)
    assert (found.out[:, :, 2] == 0).all() and (found.maps[:, 2] == 0).all()
    assert (found.maps[..., 5] == 0).all()
    loss = found.out.square().sum() + found.maps.square().sum()
    for grad in torch.autograd.grad(loss, (query, key, value, bias)):
        assert torch.isfinite(grad).all()
    (grad,) = torch.autograd.grad(
        cvg.temporal_attention(query, key, value, bias=bias, backend=backend).out.sum(), query
    )
    assert (grad[:, :, 2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is(backend):
    """A sequence that holds a NaN says so, and says it to no other sequence, though they share a tile."""
    given = tensors(Case("", 5, 2, 7, 16, 16), torch.float32, device_of(backend))
    clean = cvg.temporal_attention(*given, sigma=2.0, capture=True, backend=backend)
    given[0][2, 1, 3] = torch.nan
    out, maps = cvg.temporal_attention(*given, sigma=2.0, capture=True, backend=backend)
    assert out[2, 1, 3].isnan().all() and maps[2, 3].isnan().all()
    hurt = torch.zeros_like(out, dtype=torch.bool)
    hurt[2, 1, 3] = True
    torch.testing.assert_close(out[~hurt], clean.out[~hurt])


@pytest.mark.drawn(6)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone(backend):
    """A gradient from one output only, to one input only, is that of the definition."""
    each_gradient_alone(backend, Case("", 3, 2, 12, 16, 16), torch.float32, device_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_axes_of_positions(backend):
    """`[B, P, H, F, D]` through strides is what a copy to `[B·P, H, F, D]` gives."""
    case = CASES[1]
    given = tensors(case, torch.float32, device_of(backend))
    found = cvg.temporal_attention(*given, sigma=2.0, capture=True, backend=backend)
    copies = [t.flatten(0, 1) for t in given]
    wanted = cvg.temporal_attention(*copies, sigma=2.0, capture=True, backend=backend)
    torch.testing.assert_close(found.out.flatten(0, 1), wanted.out)
    torch.testing.assert_close(found.maps.flatten(0, 1), wanted.maps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_positions(backend):
    given = [t.requires_grad_() for t in tensors(Case("", 0, 2, 5, 8, 8), torch.float32, device_of(backend))]
    sigma = torch.tensor(1.0, device=given[0].device, requires_grad=True)
    out, maps = cvg.temporal_attention(*given, sigma=sigma, capture=True, backend=backend)
    assert out.shape == (0, 2, 5, 8) and maps.shape == (0, 5, 5)
    grads = torch.autograd.grad(out.sum() + maps.sum(), [*given, sigma])
    assert grads[0].shape == (0, 2, 5, 8) and grads[3] == 0


@pytest.mark.parametrize("backend", EXACT)
def test_more_positions_than_a_grid_has_blocks(backend):
    """131 072 sequences: past the 65 535 at which stock kernels failed."""
    given = torch.randn(3, 65_536, 2, 3, 4).unbind(0)
    found = cvg.temporal_attention(*given, sigma=1.0, capture=True, backend=backend)
    wanted, maps = eager(*given, sigma=1.0, strength=1.0)
    torch.testing.assert_close(found.out, wanted)
    torch.testing.assert_close(found.maps, maps)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("added", ["none", "band", "bias"])
@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend, added):
    """Finite differences: query, key, value, and sigma and strength, or the bias."""
    case = Case("", 2, 2, 5, 3, 4, added=added)
    options = regulariser(case, torch.float64, torch.device("cpu"))
    given = [t.requires_grad_() for t in tensors(case, torch.float64, torch.device("cpu"))]

    def attend(query, key, value, *rest):
        added = dict(zip(options, rest, strict=True))
        return tuple(cvg.temporal_attention(query, key, value, **added, capture=True, backend=backend))

    assert torch.autograd.gradcheck(attend, [*given, *options.values()])
    if backend == "reference":
        assert torch.autograd.gradgradcheck(attend, [*given, *options.values()])


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_with_the_row_maximum_held_fixed(backend):
    """Those of plain PyTorch with m detached; sigma and strength keep theirs."""
    check(backend, Case("", 3, 2, 13, 16, 16), torch.float32, row_max_grad=False)
