"""temporal_maps on every backend against attention over the whole video in float64, forward and every gradient."""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import pytest
import torch

import cvg_kernels as cvg
from tests.ops.backends import DEVICE, backends, device_of
from tests.tolerance import assert_as_exact_as, assert_maps_exact

BACKENDS = backends("temporal_maps", "reference", "native", "triton")
EXACT = BACKENDS[:2]  # those that compute in float64
pytestmark = pytest.mark.usefixtures("one_thread")


class Case(NamedTuple):
    """Sizes, how the tensors lie, and what hides keys."""

    name: str
    batch: int
    heads: int
    grid: tuple[int, int, int]
    dim: int
    text: int = 0  #: tokens of a text, before the video; as many behind it where `behind`
    behind: bool = False
    mask: str = "none"  #: "bool", "additive"
    layout: str = "heads-last"  #: "plain", "sliced"

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns + self.text

    @property
    def start(self) -> int:
        return 0 if self.behind else self.text


CASES = [
    Case("wan", 1, 2, (5, 2, 3), 128),
    Case("cogvideox", 2, 3, (4, 3, 2), 64, text=7),
    Case("hunyuan-masked", 2, 2, (5, 2, 3), 32, text=6, behind=True, mask="bool"),
    Case("additive", 2, 2, (3, 2, 2), 40, text=5, mask="additive"),
    Case("one-of-everything", 1, 1, (1, 1, 1), 1),
    Case("one-frame", 2, 2, (1, 3, 5), 24),
    Case("one-place", 2, 2, (9, 1, 1), 16, text=3),
    Case("odd-sizes", 1, 3, (7, 3, 3), 13, text=11, layout="plain"),
    Case("two-frames", 1, 1, (2, 5, 7), 8),
    Case("every-other-dim", 1, 2, (6, 2, 2), 20, layout="sliced"),
    Case("wan-21-frames", 1, 2, (21, 1, 3), 96),
]
LONG = [Case("frames-33", 1, 2, (33, 1, 2), 48), Case("frames-65", 1, 1, (65, 1, 1), 20)]
LARGE = [*LONG, Case("frames-130", 1, 2, (130, 1, 2), 32), Case("head-dim-256", 1, 2, (4, 2, 2), 256)]
by_name = {"ids": lambda case: case.name if isinstance(case, Case) else None}


def tensors(case: Case, dtype: torch.dtype, device: torch.device = DEVICE) -> list[torch.Tensor]:
    """Random query and key with the case's layout."""
    b, h, n, d = case.batch, case.heads, case.tokens, case.dim
    if case.layout == "heads-last":
        return [torch.randn(b, n, h, d).to(device, dtype).transpose(1, 2) for _ in range(2)]
    if case.layout == "sliced":
        return [torch.randn(b, h, n, 2 * d).to(device, dtype)[..., ::2] for _ in range(2)]
    return [torch.randn(b, h, n, d).to(device, dtype) for _ in range(2)]


def normalize_mask(case: Case, device: torch.device) -> torch.Tensor | None:
    """Half of the text is hidden, or every key weighs differently and two of the video are hidden."""
    if case.mask == "none":
        return None
    if case.mask == "bool":
        seen = torch.ones(case.batch, case.tokens, dtype=torch.bool)
        seen[:, -(case.text // 2) :] = False
        return seen.to(device)
    added = torch.randn(case.batch, 1, 1, case.tokens)
    added[..., case.start + 1] = added[..., -1] = -torch.inf
    return added.to(device)


def same_place(full: torch.Tensor, case: Case) -> torch.Tensor:
    """Of maps of all tokens `[B, H, N, N]` those between a place and itself, `[B, H, h·w, F, F]`."""
    frames, rows, columns = case.grid
    at = case.start + torch.arange(rows * columns, device=full.device)[:, None]
    at = at + rows * columns * torch.arange(frames, device=full.device)  # [h·w, F]
    return full[:, :, at[:, :, None], at[:, None, :]]


def logits(query, key, mask, case: Case):
    """Of everything, in the dtype of the input."""
    scores = (query @ key.mT) * case.dim**-0.5
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)[:, None, None]
    return scores + mask.to(scores.dtype)


def eager(query, key, lse, mask, case: Case, reduction: str = "none"):
    """What a user writes: maps of everything, and of these a few; the log-sum-exp is a constant."""
    scores = logits(query, key, mask, case)
    if lse is None:
        maps = same_place(scores, case).softmax(-1)
    else:
        maps = same_place((scores - lse[..., None].to(scores.dtype)).exp(), case)
    return maps.mean(1) if reduction == "mean" else maps


def ours(query, key, lse, mask, case: Case, **options):
    return cvg.temporal_maps(
        query, key, lse, case.grid, query_start=case.start, key_start=case.start, key_mask=mask, **options
    )


@pytest.mark.parametrize("case", CASES, **by_name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(3)
def test_forward_and_gradients_float32(backend, case):
    check(backend, case, torch.float32)


@pytest.mark.parametrize("case", LARGE, **by_name)
@pytest.mark.parametrize("backend", EXACT)
def test_beyond_the_gpu_kernels(backend, case):
    check(backend, case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[7], *LONG], **by_name)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(6)
def test_low_precision(backend, case, dtype):
    check(backend, case, dtype)


def check(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Maps and every gradient, in all four forms, within the budget of eager code of the same precision."""
    device = device_of(backend)
    query, key = tensors(case, dtype, device)
    mask = normalize_mask(case, device)
    exact = [t.double().requires_grad_() for t in (query, key)]
    scores = logits(*exact, mask, case).detach()
    whole = scores.logsumexp(-1)
    exponent = max(scores.where(scores.isfinite(), 0).abs().max().item(), whole.abs().max().item())
    for lse, reduction in product((whole.float(), None), ("none", "mean")):
        leaves = [t.detach().requires_grad_() for t in (query, key, lse) if t is not None]
        with cvg.trace_backends() as ran:
            maps = ours(
                *leaves[:2], None if lse is None else leaves[2], mask, case, head_reduction=reduction, backend=backend
            )
            cotangent = torch.randn(maps.shape, device=device)
            grads = torch.autograd.grad(maps, leaves, cotangent)
        backward = [] if backend == "reference" else [("temporal_maps_backward", backend)]
        assert ran == [("temporal_maps", backend), *backward]
        assert [t.dtype for t in (maps, *grads[:2])] == [torch.float32, dtype, dtype]

        right = eager(*exact, lse, mask, case, reduction)
        bound = 2e-6 if dtype == torch.float32 else 5e-6
        if lse is not None:  # what single precision leaves of a logit
            bound += exponent * torch.finfo(torch.float32).eps
        peak = right.detach().amax(-1)
        assert_maps_exact(maps.detach().mT, right.detach().mT, peak, bound)

        exact_grads = torch.autograd.grad(right, exact, cotangent.double(), retain_graph=True)
        plain = [t.detach().clone().requires_grad_() for t in (query, key)]
        plain_maps = eager(*plain, lse, mask, case, reduction)
        plain_grads = torch.autograd.grad(plain_maps, plain, cotangent.to(dtype))
        # What cancels to 0 (a frame alone has no gradient) is measured by the terms that cancel.
        longest = max(t.detach().norm(dim=-1).max().item() for t in exact)
        size = case.dim**-0.5 * longest * cotangent.abs().max().item()
        cancels = lse is None and case.grid[0] == 1
        for found, stock, want in zip(grads[:2], plain_grads, exact_grads, strict=True):
            assert_as_exact_as(
                found,
                stock,
                want,
                2.0,
                depth=max(case.grid[0], case.dim, 32),
                size=size if cancels else 0.0,
                exponent=0.0 if lse is None else exponent,
            )
        if lse is not None:
            heads = eager(*exact, lse, mask, case).detach()
            cotangents = cotangent[:, None] / case.heads if reduction == "mean" else cotangent
            total = torch.zeros_like(lse, dtype=torch.float64)
            video = total[:, :, case.start : case.start + math.prod(case.grid)]
            video.copy_(-(heads * cotangents).sum(-1).mT.flatten(2))
            torch.testing.assert_close(grads[2].double(), total, rtol=1e-4, atol=1e-5)


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_the_log_sum_exp_of_the_main_attention(backend):
    """Maps and gradients through both operations are those of the softmax over everything."""
    case, device = CASES[1], device_of(backend)
    given = [t.requires_grad_() for t in tensors(case, torch.float32, device)]
    value = torch.randn_like(given[0])
    lse = cvg.attention_with_capture(*given, value, None).lse
    maps = ours(*given, lse, None, case, backend=backend)
    weight = torch.randn_like(maps)
    exact = [t.detach().double().requires_grad_() for t in given]
    right = same_place(logits(*exact, None, case).softmax(-1), case).mean(1)
    torch.testing.assert_close(maps.double(), right, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad((maps * weight).sum(), given)
    wanted = torch.autograd.grad((right * weight).sum(), exact)
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=1e-5)
        assert have.abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_it_rows_sum_to_one(backend):
    """And are the others, divided by what a place pays to itself."""
    case = CASES[1]
    query, key = tensors(case, torch.float32, device_of(backend))
    lse = (query @ key.mT * case.dim**-0.5).logsumexp(-1)
    alone = ours(query, key, None, None, case, head_reduction="none", backend=backend)
    whole = ours(query, key, lse, None, case, head_reduction="none", backend=backend)
    torch.testing.assert_close(alone.sum(-1), torch.ones_like(alone[..., 0]))
    assert (whole.sum(-1) < 0.9).all()
    torch.testing.assert_close(alone, whole / whole.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_and_video_may_begin_anywhere(backend):
    """Queries of the video alone, keys behind a text: cross-like calls."""
    case = Case("", 1, 2, (3, 2, 2), 16, text=5)
    query, key = tensors(case, torch.float32, device_of(backend))
    wanted = ours(query, key, None, None, case, backend=backend)
    found = cvg.temporal_maps(query[:, :, 5:], key, None, case.grid, key_start=5, backend=backend)
    torch.testing.assert_close(found, wanted)
    scaled = cvg.temporal_maps(
        query[:, :, 5:] * 0.5, key, None, case.grid, key_start=5, scale=2 * 16**-0.5, backend=backend
    )
    torch.testing.assert_close(scaled, wanted)


@pytest.mark.parametrize("alone", [False, True], ids=["lse", "alone"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_keys(backend, alone):
    """It gives 0 and takes no gradient, and the other sample is as without it."""
    case, device = Case("", 2, 2, (4, 2, 2), 16), device_of(backend)
    query, key = (t.requires_grad_() for t in tensors(case, torch.float32, device))
    seen = torch.ones(2, 16, dtype=torch.bool, device=device)
    seen[0] = False
    lse = torch.zeros(2, 2, 16, device=device)
    lse[0] = -torch.inf
    lse[1] = (query @ key.mT / 4).logsumexp(-1)[1].detach()
    lse.requires_grad_()
    maps = ours(query, key, None if alone else lse, seen, case, backend=backend)
    assert (maps[0] == 0).all() and (maps[1] > 0).all()
    leaves = [query, key] + ([] if alone else [lse])
    for grad in torch.autograd.grad(maps.square().sum(), leaves):
        assert torch.isfinite(grad).all()
        assert (grad[0] == 0).all() and (grad[1] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is(backend):
    """A place that holds a NaN says so, and says it to no other, though they share a tile."""
    case = Case("", 1, 2, (3, 2, 3), 16)
    query, key = tensors(case, torch.float32, device_of(backend))
    clean = ours(query, key, None, None, case, head_reduction="none", backend=backend)
    query[0, 1, 6 + 4] = torch.nan  # frame 1, place 4
    maps = ours(query, key, None, None, case, head_reduction="none", backend=backend)
    hurt = torch.zeros_like(maps, dtype=torch.bool)
    hurt[0, 1, 4, 1] = True
    assert maps[hurt].isnan().all()
    torch.testing.assert_close(maps[~hurt], clean[~hurt])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    case = Case("", 0, 2, (3, 2, 2), 8, text=1)
    query, key = (t.requires_grad_() for t in tensors(case, torch.float32, device_of(backend)))
    maps = ours(query, key, query.new_zeros(0, 2, 13), None, case, backend=backend)
    assert maps.shape == (0, 4, 3, 3)
    for grad in torch.autograd.grad(maps.sum(), (query, key)):
        assert grad.shape == query.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_the_text_have_no_gradient(backend):
    """Zeros, written over whatever the memory held, on either side of the video."""
    for behind in (False, True):
        case = Case("", 1, 2, (3, 2, 2), 16, text=4, behind=behind)
        given = [t.requires_grad_() for t in tensors(case, torch.float32, device_of(backend))]
        maps = ours(*given, None, None, case, backend=backend)
        for grad in torch.autograd.grad(maps.square().sum(), given):
            text = torch.ones(16, dtype=torch.bool, device=grad.device)
            text[case.start : case.start + 12] = False
            assert (grad[:, :, text] == 0).all() and (grad[:, :, ~text] != 0).all()


def test_a_mask_that_depends_on_the_query_is_served_by_the_reference():
    """A window of frames and a mask by head, with the log-sum-exp under the same mask."""
    case = Case("", 2, 2, (4, 2, 2), 16, text=3)
    query, key = tensors(case, torch.float64, torch.device("cpu"))
    for shape in ((1, 1, 19, 19), (2, 2, 1, 19), (2, 1, 19, 1)):
        mask = torch.randn(shape, dtype=torch.float64)
        mask[..., -1] = -torch.inf if shape[-1] > 1 else 0.0
        scores = logits(query, key, mask, case)
        right, lse = same_place(scores.softmax(-1), case), scores.logsumexp(-1)
        with cvg.trace_backends() as ran:
            found = ours(query, key, lse, mask, case, head_reduction="none")
        assert ran == [("temporal_maps", "reference")]
        torch.testing.assert_close(found, right)
    with pytest.raises(cvg.ArgumentError, match="depends on the query or the head; backend 'nat"):
        ours(query, key, lse, torch.zeros(1, 1, 19, 19), case, backend="native")


@pytest.mark.parametrize("backend", EXACT)
def test_more_places_than_a_grid_has_blocks(backend):
    """70 000 places: past the 65 535 blocks of an axis."""
    query, key = torch.randn(2, 1, 1, 140_000, 4).unbind(0)
    found = cvg.temporal_maps(query, key, None, (2, 700, 100), backend=backend)
    q, k = (t.view(2, 70_000, 4).transpose(0, 1) for t in (query, key))
    torch.testing.assert_close(found[0], (q @ k.mT / 2).softmax(-1))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("alone", [False, True], ids=["lse", "alone"])
@pytest.mark.parametrize("backend", EXACT)
def test_gradcheck(backend, alone, reduction):
    """Finite differences: query, key and log-sum-exp, under a mask."""
    case = Case("", 1, 2, (2, 1, 2), 2, text=2, mask="additive")
    given = tensors(case, torch.float64, torch.device("cpu"))
    mask = normalize_mask(case, torch.device("cpu")).double()
    if not alone:
        given.append((given[0] @ given[1].mT).logsumexp(-1) + 1)
    given = [t.requires_grad_() for t in given]

    def maps(query, key, lse=None):
        return ours(query, key, lse, mask, case, head_reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(maps, given)
    if backend == "reference" and reduction == "mean":
        assert torch.autograd.gradgradcheck(maps, given)
