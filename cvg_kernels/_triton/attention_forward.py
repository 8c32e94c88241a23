"""Forward kernels of attention with capture.

Counting bytes: flash attention reads q, k, v and writes out; with K captured tokens, head mean, the maps add 4·K bytes per
query row, against 4·H·D (16 bit) for q and out: 3 % for K = 8, H = 5, D = 64. Done apart, the capture reads q once more,
+50 % where keys are few and traffic is what counts. So there are two ways:

* fused: a program takes a query tile through all heads, sums the maps in registers, and writes them once;
* apart: one program per tile and head (long keys: arithmetic is what counts, and parallelism), then a capture kernel
  that needs only q, the captured keys and lse, K/M of the arithmetic.

Neither uses atomics or holds maps per head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.primitives import (
    LN2,
    captured_logits2,
    dot,
    load_rows,
    logits2,
    probabilities,
    store_rows,
)


@triton.jit
def forward_kernel(
    query, key, value, token_ids, bias, out, maps, lse,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    heads, queries, keys, tokens, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS_PAD: tl.constexpr,
    HAS_VALUE: tl.constexpr, HAS_BIAS: tl.constexpr, ALL_HEADS: tl.constexpr, CAPTURE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Out = softmax(scale · q kᵀ + bias) v and lse; with CAPTURE also maps, of one head or of the mean of ALL_HEADS."""
    program = tl.program_id(0)
    tiles = tl.cdiv(queries, ROWS)
    tile, entry = program % tiles, (program // tiles).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    if ALL_HEADS:
        b, first_head, count = entry, 0, heads
    else:
        b, first_head, count = entry // heads, (entry % heads).to(tl.int32), 1
    if HAS_BIAS:
        bias += b * keys
    ids_at = tl.arange(0, TOKENS_PAD)
    wanted = ids_at < tokens
    ids = tl.load(token_ids + b * tokens + ids_at, mask=wanted, other=0)  # [K]
    captured = tl.zeros((ROWS, TOKENS_PAD), tl.float32)

    for h in range(first_head, first_head + count):
        q = load_rows(
            query + b * query_b + h * query_h, rows, queries, query_n, query_d, DIM, DIM_PAD
        )
        k_base = key + b * key_b + h * key_h
        m = tl.full((ROWS,), float("-inf"), tl.float32)  # running maximum, base 2
        l = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, VALUE_PAD), tl.float32)
        for start in range(0, keys, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            k = load_rows(k_base, columns, keys, key_n, key_d, DIM, DIM_PAD)  # [COLUMNS, D]
            s = logits2(q, k, columns, bias, keys, scale, HAS_BIAS, UPCAST)  # [ROWS, COLUMNS]
            higher = tl.maximum(m, tl.max(s, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # −∞ − (−∞) is no number
            p = tl.exp2(s - base[:, None])
            fade = tl.exp2(m - base)
            l = l * fade + tl.sum(p, 1)
            if HAS_VALUE:
                v_base = value + b * value_b + h * value_h
                v = load_rows(v_base, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD)
                acc = acc * fade[:, None] + dot(p.to(v.dtype), v, UPCAST)
            m = higher

        place = (b * heads + h) * queries
        share = tl.where(l > 0, 1.0 / l, 0.0)
        tl.store(lse + place + rows, m * LN2 + tl.log(l), mask=rows < queries)
        if HAS_VALUE:
            store_rows(
                out + place * VALUE_DIM, acc * share[:, None], rows, queries, VALUE_DIM, VALUE_PAD
            )
        if CAPTURE:
            s = captured_logits2(
                q, k_base, key_n, key_d, ids, wanted, bias, scale, DIM, DIM_PAD, HAS_BIAS, UPCAST
            )
            base = tl.where(m == float("-inf"), 0.0, m)
            captured += tl.exp2(s - base[:, None]) * share[:, None]

    if CAPTURE:
        at = (entry * tokens + ids_at)[None, :] * queries + rows[:, None]
        tl.store(maps + at, captured / count, mask=wanted[None, :] & (rows[:, None] < queries))


@triton.jit
def capture_kernel(
    query, key, token_ids, bias, maps, lse,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
    heads, queries, keys, tokens, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, TOKENS_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALL_HEADS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maps = exp(scale · q k_selᵀ + bias − lse), of one head or of the mean of ALL_HEADS, TOKENS_PAD tokens a program."""
    program = tl.program_id(0)
    tiles = tl.cdiv(queries, ROWS)
    tile, entry = program % tiles, (program // tiles).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    ids_at = tl.program_id(1) * TOKENS_PAD + tl.arange(0, TOKENS_PAD)
    wanted = ids_at < tokens
    if ALL_HEADS:
        b, first_head, count = entry, 0, heads
    else:
        b, first_head, count = entry // heads, (entry % heads).to(tl.int32), 1
    if HAS_BIAS:
        bias += b * keys
    ids = tl.load(token_ids + b * tokens + ids_at, mask=wanted, other=0)
    captured = tl.zeros((ROWS, TOKENS_PAD), tl.float32)
    for h in range(first_head, first_head + count):
        q = load_rows(
            query + b * query_b + h * query_h, rows, queries, query_n, query_d, DIM, DIM_PAD
        )
        k_base = key + b * key_b + h * key_h
        s = captured_logits2(
            q, k_base, key_n, key_d, ids, wanted, bias, scale, DIM, DIM_PAD, HAS_BIAS, UPCAST
        )
        row_lse = tl.load(lse + (b * heads + h) * queries + rows, mask=rows < queries, other=0.0)
        captured += probabilities(s, row_lse)
    at = (entry * tokens + ids_at)[None, :] * queries + rows[:, None]
    tl.store(maps + at, captured / count, mask=wanted[None, :] & (rows[:, None] < queries))
