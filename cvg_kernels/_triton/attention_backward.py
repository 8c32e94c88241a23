"""Backward kernels of attention with capture.

    δ  = Σ_d dO·O + Σ_κ dC·C − dlse            (delta_kernel)
    dP = dO vᵀ + dC E,   E_κj = [token_κ = j]
    dS = scale · P ∘ (dP − δ)
    dq = dS k                                   (query_kernel: a program per query tile)
    dk = dSᵀ q,  dv = Pᵀ dO                     (key_kernel: a program per key tile)

Captured columns enter as the product dC E with a one-hot E, only in tiles that hold a captured key; a key captured twice
adds up, and nothing needs an atomic. Guidance asks for dq only and then runs two kernels of these three.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.primitives import (
    captured_logits2,
    dot,
    load_rows,
    logits2,
    probabilities,
    store_rows,
)


@triton.jit
def load_map_grads(grad_maps, ids_at, rows, tokens, queries, heads, HEAD_MEAN: tl.constexpr):
    """DC of one head, a tile [rows, K]; the gradient of a head mean is shared out evenly."""
    at = ids_at[None, :].to(tl.int64) * queries + rows[:, None]
    inside = (ids_at[None, :] < tokens) & (rows[:, None] < queries)
    grads = tl.load(grad_maps + at, mask=inside, other=0.0)
    if HEAD_MEAN:
        grads = grads / heads
    return grads


@triton.jit
def add_map_grads(
    dp, grad_maps, token_ids, rows, columns, tokens, queries, heads,
    TOKENS_PAD: tl.constexpr, HEAD_MEAN: tl.constexpr,
):  # fmt: skip
    """DP + dC E for a tile [rows, columns]."""
    for start in range(0, tokens, TOKENS_PAD):
        ids_at = start + tl.arange(0, TOKENS_PAD)
        ids = tl.load(token_ids + ids_at, mask=ids_at < tokens, other=-1)
        one_hot = (ids[:, None] == columns[None, :]).to(tl.float32)  # [K, columns]
        if tl.sum(one_hot) > 0:
            dc = load_map_grads(grad_maps, ids_at, rows, tokens, queries, heads, HEAD_MEAN)
            dp += tl.dot(dc, one_hot, input_precision="ieee")
    return dp


@triton.jit
def delta_kernel(
    query, key, token_ids, bias, out, lse, grad_out, grad_maps, grad_lse, delta,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
    out_b, out_h, out_n, out_d, grad_b, grad_h, grad_n, grad_d,
    heads, queries, keys, tokens, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, TOKENS_PAD: tl.constexpr, HAS_OUT: tl.constexpr, HAS_MAPS: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_BIAS: tl.constexpr, HEAD_MEAN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """δ of a tile of rows of one head; the captured columns are recomputed from the captured keys."""
    tiles = tl.cdiv(queries, ROWS)
    tile, entry = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = entry // heads, entry % heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    place = entry * queries + rows
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_OUT:
        o = load_rows(
            out + b * out_b + h * out_h, rows, queries, out_n, out_d, VALUE_DIM, VALUE_PAD
        )
        do = load_rows(
            grad_out + b * grad_b + h * grad_h, rows, queries, grad_n, grad_d, VALUE_DIM, VALUE_PAD
        )
        total += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_LSE:
        total -= tl.load(grad_lse + place, mask=rows < queries, other=0.0)
    if HAS_MAPS:
        if HAS_BIAS:
            bias += b * keys
        grad_maps += (b if HEAD_MEAN else entry) * tokens * queries
        row_lse = tl.load(lse + place, mask=rows < queries, other=0.0)
        q = load_rows(
            query + b * query_b + h * query_h, rows, queries, query_n, query_d, DIM, DIM_PAD
        )
        for start in range(0, tokens, TOKENS_PAD):
            ids_at = start + tl.arange(0, TOKENS_PAD)
            wanted = ids_at < tokens
            ids = tl.load(token_ids + b * tokens + ids_at, mask=wanted, other=0)
            s = captured_logits2(
                q, key + b * key_b + h * key_h, key_n, key_d, ids, wanted, bias, scale,
                DIM, DIM_PAD, HAS_BIAS, UPCAST,
            )  # fmt: skip
            dc = load_map_grads(grad_maps, ids_at, rows, tokens, queries, heads, HEAD_MEAN)
            total += tl.sum(probabilities(s, row_lse) * dc, 1)
    tl.store(delta + place, total, mask=rows < queries)


@triton.jit
def weights_and_score_grads(
    q, k, do, v, row_lse, row_delta, rows, columns, bias, grad_maps, token_ids,
    heads, queries, keys, tokens, scale,
    TOKENS_PAD: tl.constexpr, HAS_OUT: tl.constexpr, HAS_MAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HEAD_MEAN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P and dS of a tile [rows, columns], float32."""
    p = probabilities(logits2(q, k, columns, bias, keys, scale, HAS_BIAS, UPCAST), row_lse)
    dp = tl.zeros_like(p)
    if HAS_OUT:
        dp = dot(do, tl.trans(v), UPCAST)
    if HAS_MAPS:
        dp = add_map_grads(
            dp, grad_maps, token_ids, rows, columns, tokens, queries, heads, TOKENS_PAD, HEAD_MEAN
        )
    return p, p * (dp - row_delta[:, None]) * scale


@triton.jit
def query_kernel(
    query, key, value, token_ids, bias, lse, grad_out, grad_maps, delta, grad_query,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    grad_b, grad_h, grad_n, grad_d,
    heads, queries, keys, tokens, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS_PAD: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_MAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HEAD_MEAN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Dq = Σ_j dS_ij k_j of a tile of rows."""
    tiles = tl.cdiv(queries, ROWS)
    tile, entry = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = entry // heads, entry % heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    if HAS_BIAS:
        bias += b * keys
    if HAS_MAPS:
        grad_maps += (b if HEAD_MEAN else entry) * tokens * queries
        token_ids += b * tokens
    q = load_rows(query + b * query_b + h * query_h, rows, queries, query_n, query_d, DIM, DIM_PAD)
    do = q
    if HAS_OUT:
        do = load_rows(
            grad_out + b * grad_b + h * grad_h, rows, queries, grad_n, grad_d, VALUE_DIM, VALUE_PAD
        )
    row_lse = tl.load(lse + entry * queries + rows, mask=rows < queries, other=float("-inf"))
    row_delta = tl.load(delta + entry * queries + rows, mask=rows < queries, other=0.0)
    dq = tl.zeros((ROWS, DIM_PAD), tl.float32)
    for start in range(0, keys, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = load_rows(key + b * key_b + h * key_h, columns, keys, key_n, key_d, DIM, DIM_PAD)
        v = k
        if HAS_OUT:
            v_base = value + b * value_b + h * value_h
            v = load_rows(v_base, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD)
        _, ds = weights_and_score_grads(
            q, k, do, v, row_lse, row_delta, rows, columns, bias, grad_maps, token_ids,
            heads, queries, keys, tokens, scale, TOKENS_PAD, HAS_OUT, HAS_MAPS, HAS_BIAS, HEAD_MEAN, UPCAST,
        )  # fmt: skip
        dq += dot(ds.to(k.dtype), k, UPCAST)
    store_rows(grad_query + entry * queries * DIM, dq, rows, queries, DIM, DIM_PAD)


@triton.jit
def key_kernel(
    query, key, value, token_ids, bias, lse, grad_out, grad_maps, delta, grad_key, grad_value,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    grad_b, grad_h, grad_n, grad_d,
    heads, queries, keys, tokens, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS_PAD: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_MAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HEAD_MEAN: tl.constexpr,
    NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Dk = Σ_i dS_ij q_i and dv = Σ_i P_ij dO_i of a tile of keys."""
    tiles = tl.cdiv(keys, COLUMNS)
    tile, entry = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = entry // heads, entry % heads
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    if HAS_BIAS:
        bias += b * keys
    if HAS_MAPS:
        grad_maps += (b if HEAD_MEAN else entry) * tokens * queries
        token_ids += b * tokens
    k = load_rows(key + b * key_b + h * key_h, columns, keys, key_n, key_d, DIM, DIM_PAD)
    v = k
    if HAS_OUT:
        v_base = value + b * value_b + h * value_h
        v = load_rows(v_base, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD)
    dk = tl.zeros((COLUMNS, DIM_PAD), tl.float32)
    dv = tl.zeros((COLUMNS, VALUE_PAD), tl.float32)
    for start in range(0, queries, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = load_rows(
            query + b * query_b + h * query_h, rows, queries, query_n, query_d, DIM, DIM_PAD
        )
        do = q
        if HAS_OUT:
            do_base = grad_out + b * grad_b + h * grad_h
            do = load_rows(do_base, rows, queries, grad_n, grad_d, VALUE_DIM, VALUE_PAD)
        row_lse = tl.load(lse + entry * queries + rows, mask=rows < queries, other=float("-inf"))
        row_delta = tl.load(delta + entry * queries + rows, mask=rows < queries, other=0.0)
        p, ds = weights_and_score_grads(
            q, k, do, v, row_lse, row_delta, rows, columns, bias, grad_maps, token_ids,
            heads, queries, keys, tokens, scale, TOKENS_PAD, HAS_OUT, HAS_MAPS, HAS_BIAS, HEAD_MEAN, UPCAST,
        )  # fmt: skip
        if NEED_VALUE:
            dv += dot(tl.trans(p.to(do.dtype)), do, UPCAST)
        if NEED_KEY:
            dk += dot(tl.trans(ds.to(q.dtype)), q, UPCAST)
    if NEED_KEY:
        store_rows(grad_key + entry * keys * DIM, dk, columns, keys, DIM, DIM_PAD)
    if NEED_VALUE:
        store_rows(grad_value + entry * keys * VALUE_DIM, dv, columns, keys, VALUE_DIM, VALUE_PAD)
