"""The Triton backward pass of attention against float64, on the contract of backends."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from cvg_kernels._layout import dense_like  # noqa: E402
from cvg_kernels._triton.attention_backward import backward_launches  # noqa: E402
from cvg_kernels._triton.attention_backward_tiles import (  # noqa: E402
    backward_key_tile,
    backward_row_tile,
    backward_token_tile,
    parts_of_queries,
)
from cvg_kernels.ops import _attention_reference as reference  # noqa: E402
from cvg_kernels.ops._attention_call import AttentionCall, AttentionGrads, AttentionResult, Band, Needed  # noqa: E402
from tests.tolerance import assert_as_exact_as, relative_error  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = Needed(True, True, True, True)
QUERY_ALONE = Needed(True, False, False)
UNBIASED = Needed(True, True, True)


def make(
    tokens=0,
    *,
    batch=2,
    heads=2,
    queries=19,
    keys=35,
    dim=12,
    value_dim=20,
    dtype=torch.float32,
    masked=False,
    biased=False,
    row_max_grad=None,
    head_mean=True,
    heads_last=True,
    scale=0.3,
) -> AttentionCall:
    """A call; every sample with tokens has its first one twice, a masked call a sample without keys and a hole."""

    def tensor(length, size):
        if heads_last:
            shape = (batch, length, heads, size)
            return torch.randn(shape, device=DEVICE).to(dtype).transpose(1, 2)
        return torch.randn(batch, heads, length, size, device=DEVICE).to(dtype)

    ids = token_bias = key_bias = band = None
    if tokens:
        ids = torch.randint(keys, (batch, tokens), device=DEVICE)
        ids[:, 1:2] = ids[:, :1]
    if masked:
        key_bias = torch.randn(batch, keys, device=DEVICE)
        key_bias[:, 3] = -torch.inf
        key_bias[-1] = -torch.inf
    if biased:  # by key, so that the occurrences of a key carry the same numbers
        columns = torch.randn(batch, keys, queries, device=DEVICE)
        token_bias = columns.gather(1, ids[..., None].expand(-1, -1, queries))
    if row_max_grad is not None:
        frames = (torch.randint(-1, 4, (n,), dtype=torch.int32, device=DEVICE) for n in (queries, keys))
        band = Band(*frames, 1.3, 0.8, row_max_grad)
    sizes = ((queries, dim), (keys, dim), (keys, value_dim))
    given = (tensor(*size) for size in sizes)
    return AttentionCall(*given, ids, key_bias, token_bias, band, scale, head_mean)


def in_dtype(values, dtype):
    """The floating-point tensors among `values` in `dtype`."""
    return [v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def per_key(call: AttentionCall, grad: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient of the token bias by key: how it is shared among the occurrences of a key is free."""
    if grad is None or call.token_ids is None:
        return grad
    batch, _, queries = grad.shape
    ids = call.token_ids[..., None].expand(-1, -1, queries)
    return grad.new_zeros(batch, call.key.shape[2], queries).scatter_add_(1, ids, grad)


def sizes_of_terms(call, result, grads) -> list[float]:
    """The largest sum of the absolute terms of each gradient: those of query and key cancel to less.

    The gradient of the scores is read off as that of a query with as many more dims, zero here, as there are keys,
    each of which one key alone has.
    """
    keys = call.key.shape[2]
    own = torch.eye(keys, dtype=call.key.dtype, device=DEVICE).expand(*call.key.shape[:2], -1, -1)
    none = call.query.new_zeros(*call.query.shape[:3], keys)
    wide = call._replace(query=torch.cat([call.query, none], -1), key=torch.cat([call.key, own], -1))
    scores = reference.backward(wide, result, grads, QUERY_ALONE)[0][..., -keys:].abs()
    of_query, of_key = scores @ call.key.abs(), scores.mT @ call.query.abs()
    return [of_query.max().item(), of_key.max().item(), 0.0, 0.0]


def run(call, result, grads, needed, **options):
    launches, found = backward_launches(call, result, grads, needed, **options)
    for launch in launches:
        launch.run()
    return [launch.kernel.__name__ for launch in launches], found


def check(call, given=("out", "maps", "lse"), needed=EVERYTHING, **options) -> list[str]:
    """Compares every gradient with float64, within what the reference itself errs in the call's precision."""
    dtype = call.query.dtype
    needed = needed._replace(token_bias=needed.token_bias and call.token_bias is not None)
    exact_call = AttentionCall(*in_dtype(call, torch.float64))
    exact_result = reference.forward(exact_call)
    rounded = AttentionResult(*in_dtype(exact_result, torch.float32))
    result = rounded._replace(out=exact_result.out.to(dtype))
    grads = AttentionGrads(
        *(
            torch.randn_like(tensor) if name in given and tensor is not None else None
            for name, tensor in (("out", result.out), ("maps", result.maps), ("lse", torch.ones_like(result.lse)))
        )
    )
    exact_grads = AttentionGrads(*in_dtype(grads, torch.float64))
    exact = reference.backward(exact_call, exact_result, exact_grads, needed)
    stock = reference.backward(call, result, grads, needed)
    ran, found = run(call, result, grads, needed, **options)
    assert [f is not None for f in found] == list(needed)
    for tensor, grad in zip((call.query, call.key, call.value), found[:3], strict=True):
        if grad is not None:
            assert grad.dtype == dtype and grad.stride() == dense_like(tensor).stride()
    depth = max(call.query.shape[2], call.key.shape[2])
    lse = exact_result.lse
    exponent = lse[lse.isfinite()].abs().max().item()
    sizes = sizes_of_terms(exact_call, exact_result, exact_grads)
    for index in range(4):
        if found[index] is None:
            continue
        three = [found[index], stock[index], exact[index]]
        if index == 3:
            assert found[3].is_contiguous() and found[3].dtype == torch.float32
            three = [per_key(call, grad) for grad in three]
        if dtype != torch.float32 and index < 3:
            # Out inside δ, P or dS before the product, and the result are rounded once each, as in flash attention.
            assert relative_error(three[0], three[2]) <= 3 * torch.finfo(dtype).eps
        else:
            assert_as_exact_as(*three, depth=depth, size=sizes[index], exponent=exponent)
    return ran


@pytest.mark.drawn(6)
@pytest.mark.parametrize("given", ["out", "maps", "lse", "all"])
@pytest.mark.parametrize("kind", ["captured", "biased", "band"])
def test_each_gradient_that_comes_in(given, kind):
    call = make(5, biased=kind == "biased", row_max_grad=True if kind == "band" else None, head_mean=given != "maps")
    check(call, ("out", "maps", "lse") if given == "all" else (given,))


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("biased", [False, True], ids=["captured", "biased"])
def test_masked_rows_many_tokens_and_maps_per_head(biased):
    call = make(67, batch=2, keys=70, queries=37, masked=True, biased=biased, head_mean=False)
    ran = check(call)
    assert "token_key_kernel" in ran
    assert ("token_bias_kernel" in ran) == biased


@pytest.mark.drawn(6)
@pytest.mark.parametrize("tokens", [0, 3], ids=["plain", "maps"])
@pytest.mark.parametrize("row_max_grad", [False, True], ids=["constant-maximum", "maximum"])
def test_band(tokens, row_max_grad):
    check(make(tokens, row_max_grad=row_max_grad))


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("biased", [False, True], ids=["captured", "biased"])
def test_queries_are_split_where_programs_are_few(biased):
    call = make(3, batch=1, heads=1, queries=270, keys=9, biased=biased)
    ran = check(call, processors=132)
    assert ran.count("add_parts_kernel") == 2


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value_dim", [20, 136], ids=["together", "dk-and-dv-apart"])
def test_low_precision(dtype, value_dim):
    ran = check(make(3, dtype=dtype, value_dim=value_dim))
    assert ran.count("key_kernel") == (2 if value_dim > 128 else 1)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", Needed._fields)
def test_one_gradient_alone(name):
    needed = Needed(*(field == name for field in Needed._fields))
    ran = check(make(3, biased=True), needed=needed)
    if name == "query":
        assert ran == ["row_kernel"]


def test_only_the_query_needs_one_kernel():
    for call in (make(3), make(0), make(3, row_max_grad=True)):
        assert check(call, needed=QUERY_ALONE) == ["row_kernel"]


@pytest.mark.drawn(8, of="long tests")
def test_gradients_of_any_strides():
    call = make(2, heads_last=False)
    result = reference.forward(call)
    whole = torch.randn(2, 19, 2, 20, device=DEVICE).transpose(1, 2)
    apart = whole.transpose(2, 3).contiguous().transpose(2, 3)
    one = torch.ones((), device=DEVICE).expand(whole.shape)  # as of `out.sum()`
    for grad in (whole, apart, one):
        grads = AttentionGrads(grad, None, None)
        _, found = run(call, result, grads, UNBIASED)
        wanted = reference.backward(call, result, grads, UNBIASED)
        for mine, theirs in zip(found[:3], wanted[:3], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_small_gradients_stay_within_float16():
    """`scale` is applied once, after the product: dS of 1e-6 times a scale of 0.01 is nothing in float16."""
    call = make(0, dtype=torch.float16, scale=0.01, queries=8, keys=8, dim=16, value_dim=16)
    exact_call = AttentionCall(*in_dtype(call, torch.float64))
    exact_result = reference.forward(exact_call)
    result = AttentionResult(exact_result.out.half(), None, exact_result.lse.float())
    grad = (2.0**-14 * torch.randn_like(exact_result.out)).half()
    _, (dq, _, _, _) = run(call, result, AttentionGrads(grad, None, None), QUERY_ALONE)
    wide = AttentionGrads(grad.double(), None, None)
    exact = reference.backward(exact_call, exact_result, wide, QUERY_ALONE)[0]
    assert (dq.double() - exact).abs().max() <= 2.0**-24  # the spacing of float16 there


@pytest.mark.drawn(8, of="long tests")
def test_every_run_gives_the_same_bits():
    call = make(3, batch=1, queries=270, keys=9, masked=True, biased=True)
    result = reference.forward(call)
    grads = AttentionGrads(*(torch.randn_like(t) for t in (result.out, result.maps, result.lse)))
    first, second = (run(call, result, grads, EVERYTHING, processors=132)[1] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"tokens": 0}])
def test_nothing_in_nothing_out(sizes):
    tokens = sizes.get("tokens", 3)
    call = make(3, biased=True, **{k: v for k, v in sizes.items() if k != "tokens"})
    if tokens == 0:
        call = call._replace(token_ids=call.token_ids[:, :0], token_bias=call.token_bias[:, :0])
    result = reference.forward(call)
    grads = AttentionGrads(*(torch.randn_like(t) for t in (result.out, result.maps, result.lse)))
    _, found = run(call, result, grads, EVERYTHING)
    for grad, tensor in zip(found, (call.query, call.key, call.value, call.token_bias), strict=True):
        assert grad.shape == tensor.shape and torch.isfinite(grad).all()


@pytest.mark.parametrize("head_dim", [1, 40, 64, 72, 128, 160, 256])
@pytest.mark.parametrize("hopper", [False, True])
def test_no_tile_makes_a_product_twice(head_dim, hopper):
    padded = max(16, 1 << (head_dim - 1).bit_length())
    row, key = backward_row_tile(head_dim, 2, hopper), backward_key_tile(head_dim, 2, hopper)
    for kept, passing, warps in ((row.rows, row.columns, row.warps), (key.columns, key.rows, key.warps)):
        by_rows = hopper or kept >= padded
        assert kept >= 16 * warps if by_rows else passing >= 8 * warps
    assert backward_token_tile(head_dim, 2).columns == 16


def test_queries_are_split_by_the_number_of_programs():
    assert parts_of_queries(8340, 17776, 64, 132) == (1, 278 * 64)  # CogVideoX joint: enough
    parts, rows = parts_of_queries(48, 32760, 32, 132)  # Wan cross: 48 programs on 132 processors
    assert parts == 11 and rows % 32 == 0 and (parts - 1) * rows < 32760 <= parts * rows
    assert parts_of_queries(1, 0, 64, 132) == (1, 64)
