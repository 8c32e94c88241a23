"""Kernels of the attention core's forward pass where keys pass by in a loop, and of the capture of maps.

    S' = S + m · band   or   S + key bias (+ token bias);   P = softmax(S');   out = P v;   maps = P[..., token_ids]

A program takes a tile of queries of one head through all keys, a tile of keys at a time. Nothing of captured tokens
stands in that loop: their logits are one product with the gathered keys, afterwards, and so are those of tokens with a
bias, whose columns the loop's bias leaves out.

Logits are counted in base 2. Without a bias the running maximum is that of the bare products, so that an element costs
one fused multiply-add and one exponential; for that the factor has to be positive, and a query is turned round where
`scale` is not. Only the last tile of keys is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.attention_forward_parts import (
    add_tokens,
    captured,
    finish_head,
    load_query,
    products,
    safe_base,
    store_maps,
)
from cvg_kernels._triton.primitives import (
    LOG2E,
    band_tile,
    dot,
    load_bias2,
    load_frames,
    load_rows,
    load_token_ids,
    offset_of,
    place_of,
)


@triton.jit
def weigh(
    s, m, top2, row_frames, columns, keys, loop_bias, key_frames, factor2, falloff2, strength,
    HAS_LOOP_BIAS: tl.constexpr, BAND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Unnormalised weights of a tile from its bare products, the new running maximum, and the factor of the old sums.

    The maximum is that of the bare products; under a bias or a band it is that of the logits, base 2.
    """
    if BAND:
        frames = load_frames(key_frames, columns, keys)
        s = s * factor2 + top2[:, None] * band_tile(row_frames, frames, falloff2, strength)
    if HAS_LOOP_BIAS:
        s = s * factor2 + load_bias2(loop_bias, columns, keys, WHOLE)[None, :]
    higher = tl.maximum(m, tl.max(s, 1))
    if HAS_LOOP_BIAS:
        base = safe_base(higher, True)
        return tl.exp2(s - base[:, None]), higher, tl.exp2(m - base)
    elif BAND:
        return tl.exp2(s - higher[:, None]), higher, tl.exp2(m - higher)
    else:
        p = tl.exp2(s * factor2 - (higher * factor2)[:, None])
        return p, higher, tl.exp2((m - higher) * factor2)


@triton.jit
def find_top(
    q, key, keys, key_n, key_d,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, PEELED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The largest product of each row, and the first key that has it."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    top_at = tl.zeros((ROWS,), tl.int32)
    last = keys
    if PEELED:
        last = keys // COLUMNS * COLUMNS
    for start in range(0, last, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        s = products(q, key, columns, keys, key_n, key_d, DIM, DIM_PAD, UNIT, PEELED, True, UPCAST)
        top, top_at = higher_top(s, columns, keys, top, top_at)
    if TAIL and PEELED:
        columns = last + tl.arange(0, COLUMNS)
        s = products(q, key, columns, keys, key_n, key_d, DIM, DIM_PAD, UNIT, False, True, UPCAST)
        top, top_at = higher_top(s, columns, keys, top, top_at)
    return top, top_at


@triton.jit
def higher_top(s, columns, keys, top, top_at):
    """The largest product so far and its first key, after one more tile."""
    most = tl.max(s, 1)
    first = tl.min(tl.where(s == most[:, None], columns[None, :], keys), 1)
    return tl.maximum(top, most), tl.where(most > top, first, top_at)


@triton.jit
def add_tile(
    q, key, value, m, l, acc, top2, row_frames, start, keys, key_n, key_d, value_n, value_d,
    loop_bias, key_frames, factor2, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
    HAS_VALUE: tl.constexpr, HAS_LOOP_BIAS: tl.constexpr, BAND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum and weighted values after one more tile of keys."""
    columns = start + tl.arange(0, COLUMNS)
    s = products(
        q, key, columns, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, WHOLE, not HAS_LOOP_BIAS, UPCAST
    )  # fmt: skip
    p, m, rescale = weigh(
        s, m, top2, row_frames, columns, keys, loop_bias, key_frames, factor2, falloff2, strength,
        HAS_LOOP_BIAS, BAND, WHOLE,
    )  # fmt: skip
    l = l * rescale + tl.sum(p, 1)
    if HAS_VALUE:
        v = load_rows(value, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT, WHOLE)
        acc = acc * rescale[:, None]
        acc += dot(p.to(v.dtype), v, UPCAST)
    return m, l, acc


@triton.jit
def forward_kernel(
    query, key, value, token_ids, key_bias, loop_bias, token_bias, log2_repeats, query_frames, key_frames,
    out, maps, lse, row_max, row_argmax,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    out_b, out_h, out_n, out_d, token_bias_b, token_bias_k, token_bias_n,
    batch, heads, queries, keys, tokens, factor, turn, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS_PAD: tl.constexpr,
    HAS_VALUE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HAS_LOOP_BIAS: tl.constexpr,
    HAS_TOKEN_BIAS: tl.constexpr, BAND: tl.constexpr, TURNED: tl.constexpr, CAPTURE: tl.constexpr,
    HEAD_MEAN: tl.constexpr, TAIL: tl.constexpr, PEELED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Out and lse of a tile of rows of one head, under a band m and its place; with CAPTURE also maps.

    Maps are the head's own, or under HEAD_MEAN its share in their mean, `[heads, batch, tokens, queries]`.
    """
    tile, b, h = place_of(tl.cdiv(queries, ROWS), heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    q_base = query + offset_of(b, h, query_b, query_h, QUERY_UNIT)
    k_base = key + offset_of(b, h, key_b, key_h, KEY_UNIT)
    v_base = k_base
    if HAS_VALUE:
        v_base = value + offset_of(b, h, value_b, value_h, VALUE_UNIT)
    if HAS_LOOP_BIAS:
        loop_bias += b * keys
    q = load_query(q_base, rows, queries, query_n, query_d, turn, DIM, DIM_PAD, QUERY_UNIT, TURNED)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_PAD), tl.float32)
    first_row = (b * heads + h) * queries
    top2, row_frames = m, tl.zeros((ROWS,), tl.int32)
    if BAND:
        row_frames = load_frames(query_frames, rows, queries)
        top, top_at = find_top(
            q, k_base, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, ROWS, COLUMNS, TAIL, PEELED, UPCAST
        )  # fmt: skip
        tl.store(row_argmax + first_row + rows, top_at, mask=rows < queries)
        tl.store(row_max + first_row + rows, top * factor, mask=rows < queries)
        top2 = top * (factor * LOG2E)
    last = keys
    if PEELED:
        last = keys // COLUMNS * COLUMNS
    for start in range(0, last, COLUMNS):
        m, l, acc = add_tile(
            q, k_base, v_base, m, l, acc, top2, row_frames, start, keys, key_n, key_d, value_n, value_d,
            loop_bias, key_frames, factor * LOG2E, falloff2, strength,
            DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, KEY_UNIT, VALUE_UNIT, COLUMNS, PEELED,
            HAS_VALUE, HAS_LOOP_BIAS, BAND, UPCAST,
        )  # fmt: skip
    if TAIL and PEELED:
        m, l, acc = add_tile(
            q, k_base, v_base, m, l, acc, top2, row_frames, last, keys, key_n, key_d, value_n, value_d,
            loop_bias, key_frames, factor * LOG2E, falloff2, strength,
            DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, KEY_UNIT, VALUE_UNIT, COLUMNS, False,
            HAS_VALUE, HAS_LOOP_BIAS, BAND, UPCAST,
        )  # fmt: skip
    if not (HAS_LOOP_BIAS or BAND):
        m *= factor * LOG2E
    if HAS_KEY_BIAS:
        key_bias += b * keys
    if HAS_TOKEN_BIAS or CAPTURE:
        token_ids += b * tokens
    if HAS_TOKEN_BIAS:
        token_bias += b * token_bias_b
        m, l, acc = add_tokens(
            q, k_base, v_base, m, l, acc, token_ids, log2_repeats + b * tokens, key_bias, token_bias,
            rows, queries, tokens, key_n, key_d, value_n, value_d, token_bias_k, token_bias_n, factor,
            DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, KEY_UNIT, VALUE_UNIT, TOKENS_PAD,
            HAS_VALUE, HAS_KEY_BIAS, UPCAST,
        )  # fmt: skip
    o_base = out
    if HAS_VALUE:
        o_base = out + offset_of(b, h, out_b, out_h, OUT_UNIT)
    map_weight = finish_head(
        m, l, acc, o_base, lse + first_row, rows, queries, out_n, out_d, VALUE_DIM, VALUE_PAD, OUT_UNIT, HAS_VALUE
    )  # fmt: skip
    if CAPTURE:
        ids_at = tl.arange(0, TOKENS_PAD)
        ids = load_token_ids(token_ids, ids_at, tokens)
        c = captured(
            q, k_base, ids, ids_at, safe_base(m, HAS_LOOP_BIAS), top2, row_frames, key_bias, token_bias, key_frames,
            rows, queries, tokens, key_n, key_d, token_bias_k, token_bias_n, factor, falloff2, strength,
            DIM, DIM_PAD, KEY_UNIT, HAS_KEY_BIAS, HAS_TOKEN_BIAS, BAND, UPCAST,
        )  # fmt: skip
        entry = b * heads + h
        if HEAD_MEAN:
            map_weight /= heads
            entry = h * batch + b
        store_maps(maps, c * map_weight[:, None], entry, ids_at, rows, tokens, queries)


@triton.jit
def capture_kernel(
    query, key, token_ids, key_bias, token_bias, query_frames, key_frames, maps, lse, row_max,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, token_bias_b, token_bias_k, token_bias_n,
    batch, heads, heads_each, queries, keys, tokens, scale, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr,
    ROWS: tl.constexpr, TOKENS_PAD: tl.constexpr, STAGES: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, HAS_LOOP_BIAS: tl.constexpr, HAS_TOKEN_BIAS: tl.constexpr, BAND: tl.constexpr,
    HEAD_MEAN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maps of TOKENS_PAD tokens from a known lse, of one head or the mean's share of `heads_each` heads."""
    tiles = tl.cdiv(queries, ROWS)
    tile, entry = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    groups = tl.cdiv(heads, heads_each)
    b, group = entry // groups, entry % groups
    rows = tile * ROWS + tl.arange(0, ROWS)
    ids_at = tl.program_id(1) * TOKENS_PAD + tl.arange(0, TOKENS_PAD)
    ids = load_token_ids(token_ids + b * tokens, ids_at, tokens)
    row_frames = tl.zeros((ROWS,), tl.int32)
    if HAS_KEY_BIAS:
        key_bias += b * keys
    if HAS_TOKEN_BIAS:
        token_bias += b * token_bias_b
    if BAND:
        row_frames = load_frames(query_frames, rows, queries)
    sums = tl.zeros((ROWS, TOKENS_PAD), tl.float32)
    first = group * heads_each
    for h in tl.range(first, tl.minimum(first + heads_each, heads), num_stages=STAGES):
        q_base = query + offset_of(b, h, query_b, query_h, QUERY_UNIT)
        q = load_rows(q_base, rows, queries, query_n, query_d, DIM, DIM_PAD, QUERY_UNIT)
        row_offsets = (b * heads + h) * queries + rows
        lse2 = tl.load(lse + row_offsets, mask=rows < queries, other=0.0) * LOG2E
        top2 = lse2
        if BAND:
            top2 = tl.load(row_max + row_offsets, mask=rows < queries, other=0.0) * LOG2E
        c = captured(
            q, key + offset_of(b, h, key_b, key_h, KEY_UNIT), ids, ids_at, safe_base(lse2, HAS_LOOP_BIAS), top2,
            row_frames, key_bias, token_bias, key_frames,
            rows, queries, tokens, key_n, key_d, token_bias_k, token_bias_n, scale, falloff2, strength,
            DIM, DIM_PAD, KEY_UNIT, HAS_KEY_BIAS, HAS_TOKEN_BIAS, BAND, UPCAST,
        )  # fmt: skip
        if HAS_LOOP_BIAS:
            c = tl.where((lse2 == float("-inf"))[:, None], 0.0, c)
        sums += c
    if HEAD_MEAN:
        sums /= heads
    entry = group * batch + b if HEAD_MEAN else b * groups + group
    store_maps(maps, sums, entry, ids_at, rows, tokens, queries)


@triton.jit
def add_maps_kernel(parts, maps, count, numbers, BLOCK: tl.constexpr):
    """Sums `count` maps of `numbers` numbers each, in order: the shares that groups of heads have in a mean."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + part * numbers + offsets, mask=offsets < numbers, other=0.0)
    tl.store(maps + offsets, total, mask=offsets < numbers)
