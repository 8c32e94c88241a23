"""The definition of attention with capture against arithmetic written out, stock attention and finite differences."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cvg_kernels.reference import attention as reference

TINY = torch.finfo(torch.float32).min


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def by_hand(query, key, value, token_ids, scale, mask):
    """out, maps of every head and lse, one number after the other."""
    (batch, heads, queries, dim), keys = query.shape, key.shape[2]
    out = torch.zeros(batch, heads, queries, value.shape[3], dtype=torch.float64)
    maps = torch.zeros(batch, heads, token_ids.shape[1], queries, dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, queries))).tolist():
        scores = [
            scale * sum(float(query[b, h, i, d]) * float(key[b, h, j, d]) for d in range(dim)) + float(mask[b, j])
            for j in range(keys)
        ]
        total = sum(math.exp(score) for score in scores)
        if total == 0:
            continue
        weights = [math.exp(score) / total for score in scores]
        lse[b, h, i] = math.log(total)
        for k, token in enumerate(token_ids[b].tolist()):
            maps[b, h, k, i] = weights[token]
        for j, weight in enumerate(weights):
            out[b, h, i] += weight * value[b, h, j]
    return out, maps, lse


@pytest.mark.parametrize("head_mean", [True, False], ids=["mean", "none"])
def test_against_arithmetic_written_out(head_mean):
    query, key, value = doubles(2, 2, 3, 4), doubles(2, 2, 5, 4), doubles(2, 2, 5, 3)
    ids = torch.tensor([[4, 1, 1], [0, 2, 3]])
    mask = doubles(2, 5)
    mask[0, 2] = -math.inf
    mask[1] = -math.inf  # a sample without keys
    out, maps, lse = reference.attention_with_capture(
        query, key, value, ids, scale=0.7, mask=mask[:, None, None], head_mean=head_mean
    )[:3]
    by_hand_out, by_hand_maps, by_hand_lse = by_hand(query, key, value, ids, 0.7, mask)
    torch.testing.assert_close(out, by_hand_out)
    torch.testing.assert_close(maps, by_hand_maps.mean(1) if head_mean else by_hand_maps)
    torch.testing.assert_close(lse, by_hand_lse)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 1), (2, 3, 7, 77, 40, 40), (1, 2, 33, 9, 5, 18), (0, 2, 3, 4, 8, 8), (2, 2, 0, 4, 8, 8)],
    ids=["ones", "cross", "odd", "no-sample", "no-query"],
)
def test_against_stock_attention(shape):
    """Stock attention with one-hot values returns the whole of P, and with it every map."""
    batch, heads, queries, keys, dim, value_dim = shape
    query, key = doubles(batch, heads, queries, dim), doubles(batch, heads, keys, dim)
    value = doubles(batch, heads, keys, value_dim)
    ids = torch.arange(keys).expand(batch, -1)
    out, maps, lse = reference.attention_with_capture(query, key, value, ids, scale=0.3, head_mean=False)[:3]
    hot = torch.eye(keys, dtype=torch.float64).expand(batch, heads, -1, -1)
    torch.testing.assert_close(out, scaled_dot_product_attention(query, key, value, scale=0.3))
    torch.testing.assert_close(maps.mT, scaled_dot_product_attention(query, key, hot, scale=0.3))
    torch.testing.assert_close(lse, (0.3 * query @ key.mT).logsumexp(-1))


@pytest.mark.parametrize(
    "dtype, wide",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=["fp32", "bf16", "fp16", "fp64"],
)
def test_dtypes(dtype, wide):
    query, key, value = torch.randn(3, 1, 2, 5, 8).to(dtype).unbind(0)
    out, maps, lse = reference.attention_with_capture(query, key, value, torch.tensor([[2]]), scale=0.3)[:3]
    assert (out.dtype, maps.dtype, lse.dtype) == (dtype, wide, wide)


def test_rows_without_keys_have_zero_gradients():
    """Dense mask: single rows of a head are masked, their neighbours are not."""
    inputs = [doubles(1, 2, n, 4).requires_grad_() for n in (3, 5, 5)]
    mask = torch.zeros(1, 2, 3, 5, dtype=torch.float64)
    mask[0, 1, 2] = -math.inf
    ids = torch.tensor([[0, 4]])
    out, maps, lse = reference.attention_with_capture(*inputs, ids, scale=0.5, mask=mask, head_mean=False)[:3]
    assert (out[0, 1, 2] == 0).all() and (maps[0, 1, :, 2] == 0).all()
    assert lse[0, 1, 2] == -math.inf and torch.isfinite(lse).sum() == 5
    lse_seen = lse[torch.isfinite(lse)]
    loss = out.square().sum() + maps.square().sum() + lse_seen.sum()
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    assert (grads[0][0, 1, 2] == 0).all() and (grads[0][0, 1, :2] != 0).all()
    again = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
    assert all(torch.isfinite(grad).all() for grad in (*grads, *again))
    assert (again[0][0, 1, 2] == 0).all()


@pytest.mark.parametrize("level", [-1e4, TINY, 1e4])
def test_masks_of_large_numbers_keep_rows_normalised(level):
    """P comes from a softmax, not from exp(score − lse), whose rounding grows with the logits."""
    mask = torch.full((1, 1, 1, 6), level)
    weights = reference.probabilities(torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8), scale=0.3, mask=mask).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 4), rtol=1e-6, atol=0)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("dense", [False, True], ids=["per-key", "dense"])
@pytest.mark.parametrize("values", [True, False], ids=["values", "maps-only"])
def test_gradients_of_first_and_second_order(dense, values):
    """Finite differences, the mask's gradient included."""
    inputs = [doubles(2, 2, n, 3).requires_grad_() for n in (2, 4, 4)]
    mask = doubles(2, 2, 2, 4) if dense else doubles(2, 1, 1, 4)
    inputs = [*(inputs if values else inputs[:2]), mask.requires_grad_()]
    ids = torch.tensor([[1, 1], [3, 0]])

    def attend(query, key, *rest):
        results = reference.attention_with_capture(
            query, key, rest[0] if values else None, ids, scale=0.6, mask=rest[-1], head_mean=dense
        )
        return results[:3] if values else results[1:3]

    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize("arriving", ["out", "maps", "lse", "out maps", "out maps lse"])
@pytest.mark.parametrize("head_mean", [True, False], ids=["mean", "none"])
@pytest.mark.parametrize("policy", ["plain", "masked", "token bias", "band", "band, m constant"])
def test_closed_form_is_the_gradient(arriving, head_mean, policy):
    inputs = [doubles(2, 3, n, 6).requires_grad_() for n in (5, 7, 7)]
    ids = torch.tensor([[1, 1, 6], [0, 2, 0]])
    options = {"scale": 0.4, "head_mean": head_mean}
    if policy == "masked":
        options["mask"] = doubles(2, 1, 1, 7)
        options["mask"][0, ..., 3] = -math.inf
        options["mask"][1] = -math.inf
    elif policy == "token bias":
        options["token_bias"] = doubles(2, 3, 5).requires_grad_()
        inputs.append(options["token_bias"])
    elif policy != "plain":
        options["band"] = doubles(5, 7)
        options["row_max_grad"] = policy == "band"
    results = reference.attention_with_capture(*inputs[:3], ids, **options)[:3]
    arrives = [name in arriving for name in ("out", "maps", "lse")]
    cotangents = [torch.randn_like(result) for result in results]
    grads = torch.autograd.grad(
        [result for result, yes in zip(results, arrives, strict=True) if yes],
        inputs,
        [cotangent for cotangent, yes in zip(cotangents, arrives, strict=True) if yes],
        allow_unused=True,
    )
    closed = reference.attention_with_capture_backward(
        *(cotangent if yes else None for cotangent, yes in zip(cotangents, arrives, strict=True)),
        *(tensor.detach() for tensor in inputs[:3]),
        ids,
        **options,
    )
    for found, exact, tensor in zip(closed, grads, inputs, strict=False):
        torch.testing.assert_close(found, torch.zeros_like(tensor) if exact is None else exact)
    assert (closed[3] is not None) == (policy == "token bias")


def test_token_bias_by_hand():
    """A key that is named twice gets both biases; −∞ takes a key away."""
    query, key, value = doubles(1, 2, 3, 4), doubles(1, 2, 5, 4), doubles(1, 2, 5, 3)
    bias = doubles(1, 3, 3)
    bias[0, 2] = -math.inf
    ids = torch.tensor([[1, 1, 4]])
    found = reference.attention_with_capture(query, key, value, ids, scale=0.3, token_bias=bias, head_mean=False)
    scores = 0.3 * query @ key.mT
    scores[..., 1] += bias[0, 0] + bias[0, 1]
    weights = scores[..., :4].softmax(-1)
    torch.testing.assert_close(found.out, weights @ value[:, :, :4])
    torch.testing.assert_close(found.maps[:, :, 0], weights[..., 1])
    assert torch.equal(found.maps[:, :, 0], found.maps[:, :, 1]) and (found.maps[:, :, 2] == 0).all()


def test_definitions_import_torch_only():
    accepted = {"torch", *sys.stdlib_module_names}
    for path in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith("cvg_kernels.reference.") or name.split(".")[0] in accepted, name
