"""frame_band_attention on every backend, against float64, forward and every gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cvg_kernels as cvg
from cvg_kernels.ops import first_highest_keys
from tests.ops.backends import backends, device_of
from tests.tolerance import assert_as_exact_as

BACKENDS = backends("frame_band_attention")


class Case(NamedTuple):
    """Sizes, how the tokens belong to frames, and how the tensors lie."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    frames: str = "in-order"  # "joint" (text tokens first, of no frame), "shuffled", "none"
    layout: str = "plain"  # "heads-last", "sliced"
    sigma: float = 2.0
    strength: float = 1.0


CASES = [
    Case("wan", 1, 3, 60, 60, 24, 24, layout="heads-last"),
    Case("cogvideox", 2, 2, 53, 53, 64, 64, frames="joint"),
    Case("one-of-everything", 1, 1, 1, 1, 1, 1),
    Case("one-query", 2, 2, 1, 19, 8, 8),
    Case("one-key", 2, 2, 21, 1, 16, 16),
    Case("odd-sizes", 1, 3, 41, 37, 13, 29, frames="shuffled"),
    Case("every-other-dim", 2, 2, 20, 24, 20, 20, layout="sliced"),
    Case("no-frame-at-all", 1, 2, 18, 33, 12, 12, frames="none"),
    Case("strong", 1, 2, 48, 48, 32, 32, sigma=1.0, strength=4.0),
    Case("weakening", 1, 2, 48, 48, 32, 32, frames="joint", strength=-0.7),
    Case("head-dim-128", 1, 1, 33, 70, 128, 128),
]
LONG = [
    Case("three-key-tiles", 1, 2, 70, 600, 16, 16, layout="heads-last"),
    Case("many-of-everything", 1, 1, 650, 650, 20, 12, frames="joint"),
]
by_name = {"ids": lambda case: case.name if isinstance(case, Case) else None}


def tensors(case: Case, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Random query, key and value with the case's layout."""

    def make(length: int, dim: int) -> torch.Tensor:
        if case.layout == "heads-last":
            made = torch.randn(case.batch, length, case.heads, dim).transpose(1, 2)
        elif case.layout == "sliced":
            made = torch.randn(case.batch, case.heads, length, 2 * dim)[..., ::2]
        else:
            made = torch.randn(case.batch, case.heads, length, dim)
        return made.to(device, dtype)

    lengths = (case.queries, case.dim), (case.keys, case.dim), (case.keys, case.value_dim)
    return [make(*sizes) for sizes in lengths]


def frames_of(case: Case, length: int) -> torch.Tensor:
    """The frame of every token."""
    if case.frames == "none":
        return torch.full((length,), -1)
    frames = torch.arange(length) * 5 // length  # five frames, in order
    if case.frames == "joint":
        frames = (frames - 1).clamp_min(-1)
    return frames[torch.randperm(length)] if case.frames == "shuffled" else frames


def eager(query, key, value, query_frames, key_frames, sigma, strength, row_max_grad=True):
    """What a user writes, in the dtype of the input."""
    scores = torch.einsum("...id,...jd->...ij", query, key) * query.shape[-1] ** -0.5
    distance = query_frames[:, None] - key_frames
    band = (-(distance.to(query.dtype) ** 2) / (2 * sigma**2)).exp() * strength
    band[query_frames < 0] = 0
    band[:, key_frames < 0] = 0
    highest = scores.amax(-1, keepdim=True)
    scores = scores + (highest if row_max_grad else highest.detach()) * band
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def check(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Forward and every gradient, from both outputs at once, within the budget of eager code of the same precision."""
    device = device_of(backend)
    given = [t.requires_grad_() for t in tensors(case, dtype, device)]
    frames = [frames_of(case, length).to(device) for length in (case.queries, case.keys)]
    band = {"sigma": case.sigma, "strength": case.strength}
    with cvg.trace_backends() as ran:
        found = cvg.frame_band_attention(*given, *frames, **band, backend=backend)
        cotangents = [torch.randn_like(t) for t in found]
        grads = torch.autograd.grad(found, given, cotangents)
    backward = [] if backend == "reference" else [("frame_band_attention_backward", backend)]
    assert ran == [("frame_band_attention", backend), *backward]
    assert found.out.dtype == dtype and found.lse.dtype == torch.float32
    if case.layout == "heads-last" and backend != "reference":
        assert found.out.transpose(1, 2).is_contiguous()

    exact_given = [t.detach().double().requires_grad_() for t in given]
    exact = eager(*exact_given, *frames, **band)
    exact_grads = torch.autograd.grad(exact, exact_given, [c.double() for c in cotangents])
    stock_given = [t.detach().clone().requires_grad_() for t in given]
    stock = eager(*stock_given, *frames, **band)
    stock_grads = torch.autograd.grad(stock, stock_given, [c.to(dtype) for c in cotangents])

    # The rounding of a row's maximum reaches its logits `strength` times.
    depth = max(case.queries, case.keys, case.dim, case.value_dim, 32) * (1 + abs(case.strength)) ** 2
    # What cancels to 0 (a single key has no gradient but that of lse) is measured by the terms that cancel.
    longest = [t.detach().double().norm(dim=-1).max().item() for t in (*exact_given, cotangents[0])]
    size = case.dim**-0.5 * longest[3] * longest[2] * max(longest[:2])
    size = size if min(case.keys, case.queries) == 1 else 0.0
    assert_as_exact_as(found.out.detach(), stock[0].detach(), exact[0].detach(), depth=depth)
    assert_as_exact_as(found.lse.detach(), stock[1].detach(), exact[1].detach(), depth=depth)
    for mine, plain, right in zip(grads, stock_grads, exact_grads, strict=True):
        assert_as_exact_as(mine, plain, right, 2.0, depth=depth, size=size)


@pytest.mark.parametrize("case", CASES, **by_name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(5)
def test_forward_and_gradients_float32(backend, case):
    check(backend, case, torch.float32)


@pytest.mark.parametrize("case", LONG, **by_name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(8, of="long tests")
def test_more_keys_than_a_tile(backend, case):
    check(backend, case, torch.float16 if backend == "triton" else torch.float32)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5]], **by_name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, case, dtype):
    check(backend, case, dtype)


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_band_it_is_stock_attention(backend):
    case = CASES[1]
    given = tensors(case, torch.float32, device_of(backend))
    stock = scaled_dot_product_attention(*given)
    frames, nowhere = frames_of(case, case.keys), torch.full((case.keys,), -1)
    for queries, keys, strength in ((frames, frames, 0.0), (nowhere, frames, 3.0), (frames, nowhere, 3.0)):
        found = cvg.frame_band_attention(*given, queries, keys, sigma=1.0, strength=strength, backend=backend)
        torch.testing.assert_close(found.out, stock)
    found = cvg.frame_band_attention(*given, frames, frames, sigma=1.0, strength=0.0, scale=0.3, backend=backend)
    torch.testing.assert_close(found.out, scaled_dot_product_attention(*given, scale=0.3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_a_frame_is_temporal_attention(backend):
    """The band of VSTAR itself, forward and gradient."""
    device = device_of(backend)
    given = [torch.randn(3, 2, 17, 16, device=device, requires_grad=True) for _ in range(3)]
    frames = list(range(17))
    mine = cvg.frame_band_attention(*given, frames, frames, sigma=1.5, backend=backend).out
    wanted = cvg.temporal_attention(*given, sigma=1.5, backend="reference").out
    torch.testing.assert_close(mine, wanted)
    cotangent = torch.randn_like(mine)
    grads = [torch.autograd.grad(out, given, cotangent) for out in (mine, wanted)]
    for found, right in zip(*grads, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma, limit", [(1e-3, "own"), (1e-300, "own"), (1e9, "all"), (math.inf, "all")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_limits_of_sigma(backend, sigma, limit):
    """σ → 0 adds m within a frame alone; σ → ∞ adds m to all video tokens."""
    case = Case("", 2, 2, 30, 30, 16, 16, frames="joint")
    device = device_of(backend)
    query, key, value = tensors(case, torch.float32, device)
    frames = frames_of(case, 30).to(device)
    found = cvg.frame_band_attention(query, key, value, frames, frames, sigma=sigma, backend=backend)
    near = (frames[:, None] >= 0) & (frames >= 0)
    if limit == "own":
        near &= frames[:, None] == frames
    scores = query @ key.mT / 4
    scores = scores + scores.amax(-1, keepdim=True) * near
    torch.testing.assert_close(found.out, scores.softmax(-1) @ value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_maximum_lowers_near_frames(backend):
    """Where every logit of a row is negative the band works backwards, as in VSTAR's code."""
    device = device_of(backend)
    query = torch.rand(2, 2, 24, 16, device=device) + 0.1
    key = -query.flip(-2)
    frames = torch.arange(24, device=device) // 4
    value = torch.eye(24, device=device).expand(2, 2, -1, -1)  # out is the map
    plain = cvg.frame_band_attention(query, key, value, frames, frames, sigma=1.0, strength=0.0, backend=backend).out
    found = cvg.frame_band_attention(query, key, value, frames, frames, sigma=1.0, backend=backend)
    own = (frames[:, None] == frames).expand_as(plain)
    assert (found.out[own] < plain[own]).all()
    torch.testing.assert_close(found.out, eager(query, key, value, frames, frames, 1.0, 1.0)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_vanish(backend):
    """A key far in frames that holds the maximum: e^(m − 2m) alone would be 0 in float32."""
    device = device_of(backend)
    query = torch.full((1, 1, 4, 4), 10.0, device=device)
    key = torch.tensor([[-10.0], [-10.0], [0.0], [10.0]], device=device).expand(4, 4)[None, None]
    value, frames = torch.eye(4, device=device)[None, None], torch.tensor([0, 0, 50, 100])
    frames = frames.to(device)
    found = cvg.frame_band_attention(query, key, value, frames, frames, sigma=1.0, backend=backend)
    wanted = eager(*(t.double() for t in (query, key, value)), frames, frames, 1.0, 1.0)
    torch.testing.assert_close(found.out.double(), wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.lse.double(), wanted[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("keys", [4, 700], ids=["one-tile", "more-tiles"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(6)
def test_the_row_maximum_has_a_gradient(backend, keys):
    """It is the difference between the true gradient and the one with m held fixed, and goes to the first of a tie."""
    device = device_of(backend)
    key = torch.zeros(keys, 2, device=device)
    key[:, 0] = 0.5 * torch.rand(keys)
    key[1], key[keys - 1] = torch.tensor([2.0, 1.0]), torch.tensor([2.0, -1.0])
    query = torch.tensor([[1.0, 0.0]] * 5, device=device)[None, None].requires_grad_()
    key = key[None, None].requires_grad_()
    value = torch.randn(1, 1, keys, 3, device=device)
    frames = torch.arange(5, device=device), torch.arange(keys, device=device)

    def found(row_max_grad):
        out = cvg.frame_band_attention(
            query, key, value, *frames, sigma=1.0, scale=1.0, row_max_grad=row_max_grad, backend=backend
        ).out
        return torch.autograd.grad(out.square().sum(), (query, key))

    def wanted(row_max_grad):
        q, k, v = (t.detach().double().requires_grad_() for t in (query, key, value))
        s = q @ k.mT
        m = s[..., 1:2] if row_max_grad else s[..., 1:2].detach()  # the first of the two that tie
        distance = (frames[0][:, None] - frames[1]).double()
        s = s + m * (-distance.square() / 2).exp()
        return torch.autograd.grad((s.softmax(-1) @ v).square().sum(), (q, k))

    for row_max_grad in (True, False):
        for mine, right in zip(found(row_max_grad), wanted(row_max_grad), strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-6)
    difference = found(True)[1] - found(False)[1]
    others = torch.arange(keys, device=device) != 1
    assert difference[0, 0, 1].abs().max() > 100 * difference[0, 0, others].abs().max()


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is(backend):
    """A query that is not a number says so, and to no other query."""
    case = Case("", 1, 2, 40, 600, 16, 16)
    given = tensors(case, torch.float32, device_of(backend))
    frames = frames_of(case, 40), frames_of(case, 600)
    clean = cvg.frame_band_attention(*given, *frames, sigma=1.0, backend=backend).out
    given[0][0, 1, 7] = torch.nan
    out = cvg.frame_band_attention(*given, *frames, sigma=1.0, backend=backend).out
    assert out[0, 1, 7].isnan().all()
    hurt = torch.zeros_like(out, dtype=torch.bool)
    hurt[0, 1, 7] = True
    torch.testing.assert_close(out[~hurt], clean[~hurt])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_highest_keys(backend):
    """Of ties the first; with queries and keys of different numbers.

    Whole numbers: their products are exact in any order of summation, so ties are ties, and there are many.
    """
    device = device_of(backend)
    query, key = (torch.randint(-2, 3, (2, 3, rows, 16), device=device).float() for rows in (37, 53))
    key[:, :, 40] = key[:, :, 7]
    found = first_highest_keys(query, key, scale=0.3, backend=backend)
    assert torch.equal(found, (query @ key.mT).argmax(-1))
