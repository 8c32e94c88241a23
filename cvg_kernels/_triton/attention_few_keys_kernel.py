"""The attention core's forward kernel where keys are so few that one tile holds them all: text of 77 or 128 tokens.

There traffic is what counts: queries come in and outputs go out once, and the keys of a head are nothing. A program
takes a tile of queries through several heads in turn; while one is at work the next one's queries, keys and values are
on their way. The maps of its heads are summed in registers: they add 4·K bytes to a row of queries, where a second
pass over the queries would add half of what attention itself moves. Captured keys are gathered, a product of their
own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.attention_forward_parts import (
    captured,
    finish_head,
    load_query,
    products,
    safe_base,
    store_maps,
)
from cvg_kernels._triton.primitives import LOG2E, dot, load_bias2, load_rows, load_token_ids, offset_of


@triton.jit
def few_keys_kernel(
    query, key, value, token_ids, key_bias, out, maps, lse,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    out_b, out_h, out_n, out_d,
    batch, heads, heads_each, queries, keys, tokens, factor, turn,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr, TOKENS_PAD: tl.constexpr, STAGES: tl.constexpr,
    HAS_VALUE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, TURNED: tl.constexpr, CAPTURE: tl.constexpr,
    HEAD_MEAN: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Out and lse of a tile of rows of `heads_each` heads; with CAPTURE also maps.

    The keys are COLUMNS and, if REST is not 0, up to REST more. Maps are those of one head, or under HEAD_MEAN the
    share of the program's heads in their mean, `[groups, batch, tokens, queries]`.
    """
    groups = tl.cdiv(heads, heads_each)
    tiles = tl.cdiv(queries, ROWS)
    tile, entry = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, group = entry // groups, entry % groups
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns, rest = tl.arange(0, COLUMNS), tl.arange(0, REST if REST > 0 else 16) + COLUMNS
    WHOLE: tl.constexpr = REST > 0 or not TAIL
    MASK: tl.constexpr = not HAS_KEY_BIAS
    factor2 = factor * LOG2E
    ids_at = tl.arange(0, TOKENS_PAD)
    if HAS_KEY_BIAS:
        key_bias += b * keys
    if CAPTURE:
        token_ids += b * tokens
        ids = load_token_ids(token_ids, ids_at, tokens)
        sums = tl.zeros((ROWS, TOKENS_PAD), tl.float32)

    first = group * heads_each
    for h in tl.range(first, tl.minimum(first + heads_each, heads), num_stages=STAGES):
        k_base = key + offset_of(b, h, key_b, key_h, KEY_UNIT)
        q_base = query + offset_of(b, h, query_b, query_h, QUERY_UNIT)
        q = load_query(q_base, rows, queries, query_n, query_d, turn, DIM, DIM_PAD, QUERY_UNIT, TURNED)
        s = products(q, k_base, columns, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, WHOLE, MASK, UPCAST)
        if HAS_KEY_BIAS:
            s = s * factor2 + load_bias2(key_bias, columns, keys, WHOLE)[None, :]
        m = tl.max(s, 1)
        if REST > 0:
            t = products(q, k_base, rest, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, not TAIL, MASK, UPCAST)
            if HAS_KEY_BIAS:
                t = t * factor2 + load_bias2(key_bias, rest, keys, not TAIL)[None, :]
            m = tl.maximum(m, tl.max(t, 1))
        if not HAS_KEY_BIAS:
            m *= factor2
        base = safe_base(m, HAS_KEY_BIAS)
        p = weights(s, base, factor2, HAS_KEY_BIAS)
        l = tl.sum(p, 1)
        acc = tl.zeros((ROWS, VALUE_PAD), tl.float32)
        v_base = k_base
        if HAS_VALUE:
            v_base = value + offset_of(b, h, value_b, value_h, VALUE_UNIT)
            v = load_rows(v_base, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT, WHOLE)
            acc = dot(p.to(v.dtype), v, UPCAST)
        if REST > 0:
            p = weights(t, base, factor2, HAS_KEY_BIAS)
            l += tl.sum(p, 1)
            if HAS_VALUE:
                v = load_rows(v_base, rest, keys, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT, not TAIL)
                acc += dot(p.to(v.dtype), v, UPCAST)
        o_base = out
        if HAS_VALUE:
            o_base = out + offset_of(b, h, out_b, out_h, OUT_UNIT)
        map_weight = finish_head(
            m, l, acc, o_base, lse + (b * heads + h) * queries, rows, queries, out_n, out_d,
            VALUE_DIM, VALUE_PAD, OUT_UNIT, HAS_VALUE,
        )  # fmt: skip
        if CAPTURE:
            c = captured(
                q, k_base, ids, ids_at, safe_base(m, HAS_KEY_BIAS), m, m, key_bias, key_bias, key_bias,
                rows, queries, tokens, key_n, key_d, 0, 0, factor, 0.0, 0.0,
                DIM, DIM_PAD, KEY_UNIT, HAS_KEY_BIAS, False, False, UPCAST,
            )  # fmt: skip
            sums += c * map_weight[:, None]

    if CAPTURE:
        entry = b * groups + group
        if HEAD_MEAN:
            sums /= heads
            entry = group * batch + b
        store_maps(maps, sums, entry, ids_at, rows, tokens, queries)


@triton.jit
def weights(s, base2, factor2, LOGITS: tl.constexpr):
    """2^(S − base2) of a tile, from logits, base 2, or from bare products."""
    if LOGITS:
        return tl.exp2(s - base2[:, None])
    else:
        return tl.exp2(s * factor2 - base2[:, None])
