"""What changes the logits of attention with capture, a token bias or a band by frames, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
import torch.utils.checkpoint
from cvg_kernels.reference.frame_band_attention import frame_band

import cvg_kernels as cvg
from cvg_kernels.reference import attention as reference
from tests.ops.backends import backends, device_of
from tests.tolerance import assert_as_exact_as

BACKENDS = backends("attention", "reference", "native", "triton")
SCALE = 0.3


def tensors(device, dtype, queries=37, keys=45, dim=24, heads=3, batch=2) -> list[torch.Tensor]:
    """Random query, key and value, laid out as diffusers has them."""
    return [
        torch.randn(batch, n, heads, dim).to(device, dtype).transpose(1, 2).requires_grad_()
        for n in (queries, keys, keys)
    ]


def compare(found, given, exact, exact_given, eager, eager_given) -> None:
    """Results and gradients against float64, within the budget of eager code in the same precision."""
    shared = [torch.randn_like(tensor) for tensor in found]
    grads = torch.autograd.grad(found, given, shared)
    wanted = torch.autograd.grad(exact, exact_given, [c.double() for c in shared])
    plain = torch.autograd.grad(eager, eager_given, [c.to(e.dtype) for c, e in zip(shared, eager, strict=True)])
    for mine, stock, right in zip((*found, *grads), (*eager, *plain), (*exact, *wanted), strict=True):
        assert_as_exact_as(mine.detach(), stock.detach(), right.detach(), 2.5, depth=256)


def twice(given: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same numbers as leaves in float64 and, for the budget, in their own dtype."""
    return (
        [t.detach().double().requires_grad_() for t in given],
        [t.detach().clone().requires_grad_() for t in given],
    )


def eager(query, key, value, ids, head_mean, *, add=None, band=None):
    """What a user writes: eager code in the dtype of the input."""
    scores = SCALE * query @ key.mT
    if band is not None:
        scores = scores + scores.amax(-1, keepdim=True) * band.to(scores.dtype)
    if add is not None:
        scores = scores + add.to(scores.dtype)
    weights = scores.softmax(-1)
    columns = ids[:, None, None, :].expand(*weights.shape[:-1], -1)
    maps = weights.gather(-1, columns).mT
    return weights @ value, maps.mean(1) if head_mean else maps, scores.logsumexp(-1)


@pytest.mark.parametrize("shape", ["K", "BK", "BKN"])
@pytest.mark.parametrize("repeats", [False, True], ids=["distinct", "repeats"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(12)
def test_token_bias(backend, dtype, repeats, shape):
    device = device_of(backend)
    given = tensors(device, dtype)
    ids = torch.tensor([[3, 44, 3, 7], [0, 1, 2, 0]] if repeats else [[3, 44, 9, 7], [0, 1, 2, 4]])
    ids = ids.to(device)
    sizes = {"K": (4,), "BK": (2, 4), "BKN": (2, 4, 37)}[shape]
    given.append((2 * torch.randn(sizes, device=device)).requires_grad_())
    head_mean = shape != "BK"
    with cvg.trace_backends() as ran:
        found = cvg.attention_with_capture(
            *given[:3],
            ids,
            scale=SCALE,
            token_bias=given[3],
            backend=backend,
            head_reduction="mean" if head_mean else "none",
        )
    assert ran == [("attention", backend)]

    def spread(bias, queries, keys):
        """The bias as a matrix over all keys."""
        bias = bias.expand(2, 4)[..., None] if shape == "K" else bias
        bias = bias[..., None] if bias.ndim == 2 else bias
        hot = torch.nn.functional.one_hot(ids, keys).to(bias.dtype)
        return torch.einsum("bkn,bkm->bnm", bias.expand(2, 4, queries), hot)[:, None]

    exact_given, eager_given = twice(given)
    results = [
        eager(*leaves[:3], ids, head_mean, add=spread(leaves[3], 37, 45)) for leaves in (exact_given, eager_given)
    ]
    compare(found, given, results[0], exact_given, results[1], eager_given)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_takes_a_token_away(backend):
    """−∞ is a key that is not seen: by all queries, or by those of a layout."""
    device = device_of(backend)
    query, key, value = tensors(device, torch.float32)
    seen = torch.ones(2, 45, dtype=torch.bool, device=device)
    seen[:, 5] = False
    options = {"scale": SCALE, "backend": backend}
    masked = cvg.attention_with_capture(query, key, value, [3], key_mask=seen, **options)
    bias = torch.tensor([-math.inf, 0.0], device=device)
    found = cvg.attention_with_capture(query, key, value, [5, 3], token_bias=bias, **options)
    torch.testing.assert_close(found.out, masked.out)
    torch.testing.assert_close(found.lse, masked.lse)
    torch.testing.assert_close(found.maps[:, 1:], masked.maps)
    assert (found.maps[:, 0] == 0).all()
    grads = torch.autograd.grad(found.out.square().sum(), (query, key, value))
    wanted = torch.autograd.grad(masked.out.square().sum(), (query, key, value))
    for mine, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)

    layout = torch.zeros(2, 1, 37, device=device)
    layout[:, :, ::2] = -math.inf
    some = cvg.attention_with_capture(query, key, value, [5], token_bias=layout, **options)
    plain = cvg.attention_with_capture(query, key, value, [5], **options)
    torch.testing.assert_close(some.out[:, :, ::2], found.out[:, :, ::2])
    torch.testing.assert_close(some.out[:, :, 1::2], plain.out[:, :, 1::2])


@pytest.mark.drawn(6)
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_bias_beside_a_mask(backend):
    device = device_of(backend)
    given = tensors(device, torch.float32)
    mask = torch.randn(2, 1, 1, 45, device=device)
    mask[0, ..., 3] = -math.inf
    bias = torch.randn(3, device=device)
    found = cvg.attention_with_capture(*given, [3, 9, 0], scale=SCALE, key_mask=mask, token_bias=bias, backend=backend)
    dense = mask.clone()
    dense[..., [3, 9, 0]] += bias
    exact_given, eager_given = twice(given)
    ids = torch.tensor([[3, 9, 0]] * 2, device=device)
    results = [eager(*leaves, ids, True, add=dense) for leaves in (exact_given, eager_given)]
    compare(found, given, results[0], exact_given, results[1], eager_given)


@pytest.mark.parametrize("row_max_grad", [True, False], ids=["m", "m-constant"])
@pytest.mark.parametrize("head_reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.drawn(6)
def test_maps_under_a_band(backend, dtype, head_reduction, row_max_grad):
    """Maps of video tokens, which the band changes, and of text tokens, which it does not, in one pass."""
    device = device_of(backend)
    given = tensors(device, dtype, queries=40, keys=40)
    frames = torch.tensor([-1] * 4 + [f for f in range(6) for _ in range(6)], device=device)
    band = cvg.FrameBand(frames, frames, sigma=1.5, strength=0.8, row_max_grad=row_max_grad)
    ids = [0, 3, 20, 20, 39]
    with cvg.trace_backends() as ran:
        found = cvg.attention_with_capture(
            *given, ids, scale=SCALE, band=band, head_reduction=head_reduction, backend=backend
        )
    assert ran == [("frame_band_attention", backend)]
    alone = cvg.capture_maps(*given[:2], ids, scale=SCALE, band=band, head_reduction=head_reduction, backend=backend)
    torch.testing.assert_close(alone.maps, found.maps, rtol=1e-5, atol=1e-7)
    listed = torch.tensor([ids] * 2, device=device)
    exact_given, eager_given = twice(given)
    results = []
    for leaves in (exact_given, eager_given):
        wide = torch.promote_types(leaves[0].dtype, torch.float32)
        matrix = 0.8 * frame_band(frames, frames, 1.5, wide)
        if row_max_grad:
            results.append(eager(*leaves, listed, head_reduction == "mean", band=matrix))
        else:
            results.append(
                reference.attention_with_capture(
                    *leaves, listed, scale=SCALE, band=matrix, row_max_grad=False, head_mean=head_reduction == "mean"
                )[:3]
            )
    compare(found, given, results[0], exact_given, results[1], eager_given)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("backend", backends("attention", "native", "triton"))
def test_the_output_can_be_written_into(backend):
    """It is a tensor of its own, no view of one, which autograd would let nobody change."""
    query, key, value = tensors(device_of(backend), torch.float32)
    found = cvg.attention_with_capture(query, key, value, [1], backend=backend)
    found.maps.mul_(2)
    (grad,) = torch.autograd.grad(found.maps.sum(), query)
    right = cvg.attention_with_capture(query, key, value, [1], backend=backend).maps.sum()
    torch.testing.assert_close(grad, 2 * torch.autograd.grad(right, query)[0])
    found.out.add_(1)


@pytest.mark.parametrize("backend", backends("attention", "native", "stock"))
def test_traced_by_jit(backend):
    """A trace holds the operation, not the memory that it wrote into."""
    query, key, value = (t.detach() for t in tensors(device_of(backend), torch.float32))

    def attend(*given):
        return tuple(cvg.attention_with_capture(*given, [1, 2], backend=backend))

    traced = torch.jit.trace(attend, (query, key, value), check_trace=False)
    for mine, right in zip(traced(2 * query, key, value), attend(2 * query, key, value), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("layout", ["heads-last", "heads-first"])
@pytest.mark.parametrize("backend", backends("attention", "reference", "native", "triton", "stock"))
def test_results_lie_as_the_query_does(backend, layout):
    """Diffusers reshapes the output to [B, N, H · D]: no copy where the query came from there."""
    device = device_of(backend)
    shape = (2, 37, 3, 24) if layout == "heads-last" else (2, 3, 37, 24)
    given = [torch.randn(shape, device=device).bfloat16() for _ in range(3)]
    if layout == "heads-last":
        given = [t.transpose(1, 2) for t in given]
    given = [t.requires_grad_() for t in given]
    found = cvg.attention_with_capture(*given, [1], backend=backend)
    grads = torch.autograd.grad((found.out, found.maps), given, [found.out, found.maps])
    grads = grads if backend != "reference" else ()  # torch's own
    for tensor in (found.out, *grads):
        dense = tensor.transpose(1, 2) if layout == "heads-last" else tensor
        assert dense.is_contiguous()


@pytest.mark.drawn(6)
@pytest.mark.parametrize("backend", backends("attention", "reference", "native", "triton"))
def test_nothing_captured(backend):
    given = tensors(device_of(backend), torch.float32)
    found = cvg.attention_with_capture(*given, None, backend=backend)
    wanted = cvg.attention_with_capture(*given, [0], backend=backend)
    assert found.maps is None
    torch.testing.assert_close(found.out, wanted.out)
    torch.testing.assert_close(found.lse, wanted.lse)
    grads = torch.autograd.grad((found.out, found.lse), given, [found.out, found.lse])
    right = torch.autograd.grad((wanted.out, wanted.lse), given, [wanted.out, wanted.lse])
    for mine, other in zip(grads, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"token_bias": torch.zeros(3)}, r"\[K\], \[B, K\] or \[B, K, N\]"),
        ({"token_bias": torch.zeros(2, 2, 36)}, r"\[K\], \[B, K\] or \[B, K, N\]"),
        ({"token_bias": torch.zeros(2, dtype=torch.int64)}, "token_bias must be a floating point"),
        ({"token_bias": [0.0, 1.0]}, "token_bias must be a floating point tensor or None, got list"),
        ({"scale": "1"}, "scale must be a number or None, got '1'"),
        ({"scale": float("nan")}, "scale must be a number or None, got nan"),
        ({"scale": torch.ones((), requires_grad=True)}, "scale must not require a gradient"),
        ({"deterministic": "no"}, "deterministic must be True, False or None, got 'no'"),
        ({"key_mask": torch.ones(2, 45)}, "key_mask must be bool"),
        ({"band": 2.0}, "band must be a FrameBand or None, got float"),
        ({"band": cvg.FrameBand([0] * 37, [0] * 45, sigma=0.0)}, "sigma must be above 0"),
        ({"band": cvg.FrameBand([0] * 36, [0] * 45, sigma=1.0)}, "query_frames must have shape"),
        ({"band": cvg.FrameBand([0] * 37, [0] * 45, 1.0), "key_mask": torch.ones(2, 45) > 0}, "key_mask cannot"),
        ({"band": cvg.FrameBand([0] * 37, [0] * 45, 1.0), "token_bias": torch.zeros(2)}, "token_bias cannot"),
    ],
)
def test_what_does_not_fit_is_said(options, message):
    given = tensors(torch.device("cpu"), torch.float32)
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.attention_with_capture(*given, [0, 1], **options)


def test_a_bias_needs_tokens():
    given = tensors(torch.device("cpu"), torch.float32)
    with pytest.raises(cvg.ArgumentError, match="token_bias needs token_ids"):
        cvg.attention_with_capture(*given, None, token_bias=torch.zeros(1))
    with pytest.raises(cvg.ArgumentError, match="token_ids must name the keys"):
        cvg.capture_maps(*given[:2], None)


def test_lists_of_ids_are_copied_once(monkeypatch):
    """The second call makes no tensor of the list; a list kept from inference mode serves a call with gradients."""
    from cvg_kernels.ops import _integers

    query, key, value = tensors(torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        first = cvg.attention_with_capture(query, key, value, [11, 29, 31])
    monkeypatch.setattr(_integers.torch, "tensor", None)  # calling it would fail
    again = cvg.attention_with_capture(query, key, value, [11, 29, 31])
    torch.testing.assert_close(again.maps, first.maps)
    torch.autograd.grad(again.maps.sum(), (query, key))
    with pytest.raises(cvg.ArgumentError, match=r"token_ids must lie in \[0, 30\)"):
        cvg.capture_maps(query, key[:, :, :30], [11, 29, 31])


@pytest.mark.drawn(6)
@pytest.mark.parametrize("backend", backends("attention", "native", "triton", "stock"))
def test_gradients_are_the_same_under_checkpointing(backend):
    given = tensors(device_of(backend), torch.float32)

    def loss(*given):
        found = cvg.attention_with_capture(*given, [3, 9], scale=SCALE, backend=backend)
        return found.out.square().sum() + found.maps.square().sum()

    wanted = torch.autograd.grad(loss(*given), given)
    again = torch.utils.checkpoint.checkpoint(loss, *given, use_reentrant=False)
    for mine, right in zip(torch.autograd.grad(again, given), wanted, strict=True):
        torch.testing.assert_close(mine, right)
