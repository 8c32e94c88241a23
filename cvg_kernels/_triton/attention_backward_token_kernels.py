"""What the backward pass of attention does for chosen tokens, outside the loops over keys and queries.

    C = P[..., token_ids], recomputed from the gathered keys and lse
    dS = C ∘ dC                                            of a captured token
    dS = C / repeats ∘ (dO v_selᵀ − δ) + C ∘ dC            of a token with a bias, which no loop goes through
    d token_bias = Σ_heads dS

`token_key_kernel` sums dSᵀ q and (C / repeats)ᵀ dO over a chunk of the queries, a row for each token;
`add_token_rows` adds these rows to the keys that they belong to, in the order of chunks and tokens: a token that
occurs twice adds up, nothing needs an atomic, and every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.primitives import (
    LOG2E,
    dot,
    load_frames,
    load_rows,
    load_token_ids,
    offset_of,
    place_of,
    store_rows,
    token_scores2,
)


@triton.jit
def load_lse2(lse, row_offsets, inside):
    """log₂e · lse of rows; ∞ outside, and in rows without keys: their weights 2^(S − lse) are 0 then."""
    found = tl.load(lse + row_offsets, mask=inside, other=float("inf")) * LOG2E
    return tl.where(found == float("-inf"), float("inf"), found)


@triton.jit
def load_map_grads(grad_maps, ids_at, rows, tokens, queries, heads, HEAD_MEAN: tl.constexpr):
    """DC of one head, a tile [rows, K]; the gradient of a head mean is shared out evenly."""
    offsets = ids_at[None, :].to(tl.int64) * queries + rows[:, None]
    inside = (ids_at[None, :] < tokens) & (rows[:, None] < queries)
    grads = tl.load(grad_maps + offsets, mask=inside, other=0.0)
    if HEAD_MEAN:
        grads = grads / heads
    return grads


@triton.jit
def token_probabilities(
    q, k_sel, ids, ids_at, rows, lse2, top2, row_frames, key_bias, token_bias, key_frames,
    token_bias_k, token_bias_n, tokens, queries, scale, falloff2, strength,
    HAS_KEY_BIAS: tl.constexpr, HAS_TOKEN_BIAS: tl.constexpr, BAND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """C, [rows, K], 0 beyond the tokens, and the band at their columns (without one: C again)."""
    s, band = token_scores2(
        q, k_sel, ids, ids_at, rows, top2, row_frames, key_bias, token_bias, key_frames,
        token_bias_k, token_bias_n, tokens, queries, scale, falloff2, strength,
        HAS_KEY_BIAS, HAS_TOKEN_BIAS, BAND, UPCAST,
    )  # fmt: skip
    return tl.where(ids_at[None, :] < tokens, tl.exp2(s - lse2[:, None]), 0.0), band


@triton.jit
def token_score_grads(
    q, k_sel, do, v_sel, ids, ids_at, rows, lse2, row_delta, top2, row_frames,
    key_bias, token_bias, log2_repeats, key_frames, grad_maps,
    token_bias_k, token_bias_n, heads, tokens, queries, scale, falloff2, strength,
    HAS_OUT: tl.constexpr, HAS_MAPS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HAS_TOKEN_BIAS: tl.constexpr,
    HEAD_MEAN: tl.constexpr, BAND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """DS of chosen tokens and their C / repeats, [rows, K]."""
    c, _ = token_probabilities(
        q, k_sel, ids, ids_at, rows, lse2, top2, row_frames, key_bias, token_bias, key_frames,
        token_bias_k, token_bias_n, tokens, queries, scale, falloff2, strength,
        HAS_KEY_BIAS, HAS_TOKEN_BIAS, BAND, UPCAST,
    )  # fmt: skip
    ds = tl.zeros_like(c)
    share = c
    if HAS_TOKEN_BIAS:
        repeats = tl.load(log2_repeats + ids_at, mask=ids_at < tokens, other=0.0)
        share = c * tl.exp2(-repeats)[None, :]
        if HAS_OUT:
            ds += share * (dot(do, tl.trans(v_sel), UPCAST) - row_delta[:, None])
        else:
            ds -= share * row_delta[:, None]
    if HAS_MAPS:
        ds += c * load_map_grads(grad_maps, ids_at, rows, tokens, queries, heads, HEAD_MEAN)
    return ds, share


@triton.jit
def token_key_kernel(
    query, key, value, token_ids, key_bias, token_bias, log2_repeats, query_frames, key_frames,
    lse, row_max, grad_out, grad_maps, delta, token_key_parts, token_value_parts,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    grad_out_b, grad_out_h, grad_out_n, grad_out_d, token_bias_b, token_bias_k, token_bias_n,
    batch, heads, queries, keys, tokens, chunks, rows_each, scale, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, GRAD_OUT_UNIT: tl.constexpr,
    ROWS: tl.constexpr, TOKENS_PAD: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_MAPS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HAS_TOKEN_BIAS: tl.constexpr,
    HEAD_MEAN: tl.constexpr, BAND: tl.constexpr, NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dSᵀ q and (C / repeats)ᵀ dO of TOKENS_PAD tokens, from `rows_each` queries: float32 [chunks, B, H, K, D]."""
    chunk, b, h = place_of(chunks, heads)
    entry = b * heads + h
    ids_at = tl.program_id(1) * TOKENS_PAD + tl.arange(0, TOKENS_PAD)
    ids = load_token_ids(token_ids + b * tokens, ids_at, tokens)
    q_base = query + offset_of(b, h, query_b, query_h, QUERY_UNIT)
    do_base = q_base
    k_base = key + offset_of(b, h, key_b, key_h, KEY_UNIT)
    k = load_rows(k_base, ids, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, True)
    v = k
    if HAS_KEY_BIAS:
        key_bias += b * keys
    if HAS_TOKEN_BIAS:
        log2_repeats += b * tokens
        token_bias += b * token_bias_b
        if HAS_OUT:
            do_base = grad_out + offset_of(b, h, grad_out_b, grad_out_h, GRAD_OUT_UNIT)
            v_base = value + offset_of(b, h, value_b, value_h, VALUE_UNIT)
            v = load_rows(v_base, ids, keys, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT, True)
    if HAS_MAPS:
        grad_maps += (b if HEAD_MEAN else entry) * tokens * queries
    dk = tl.zeros((TOKENS_PAD, DIM_PAD), tl.float32)
    dv = tl.zeros((TOKENS_PAD, VALUE_PAD), tl.float32)
    first = chunk * rows_each
    for start in range(first, tl.minimum(first + rows_each, queries), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < queries
        row_offsets = entry * queries + rows
        q = load_rows(q_base, rows, queries, query_n, query_d, DIM, DIM_PAD, QUERY_UNIT)
        do = q
        lse2 = load_lse2(lse, row_offsets, inside)
        row_delta = tl.zeros((ROWS,), tl.float32)
        top2 = lse2
        row_frames = rows
        if HAS_TOKEN_BIAS:
            if NEED_KEY:
                row_delta = tl.load(delta + row_offsets, mask=inside, other=0.0)
            if HAS_OUT:
                do = load_rows(
                    do_base, rows, queries, grad_out_n, grad_out_d, VALUE_DIM, VALUE_PAD, GRAD_OUT_UNIT
                )  # fmt: skip
        if BAND:
            top2 = tl.load(row_max + row_offsets, mask=inside, other=0.0) * LOG2E
            row_frames = load_frames(query_frames, rows, queries)
        ds, share = token_score_grads(
            q, k, do, v, ids, ids_at, rows, lse2, row_delta, top2, row_frames,
            key_bias, token_bias, log2_repeats, key_frames, grad_maps,
            token_bias_k, token_bias_n, heads, tokens, queries, scale, falloff2, strength,
            HAS_OUT, HAS_MAPS, HAS_KEY_BIAS, HAS_TOKEN_BIAS, HEAD_MEAN, BAND, UPCAST,
        )  # fmt: skip
        if NEED_KEY:
            dk += dot(tl.trans(ds.to(q.dtype)), q, UPCAST)
        if HAS_TOKEN_BIAS and NEED_VALUE:
            dv += dot(tl.trans(share.to(do.dtype)), do, UPCAST)
    part_offset = (chunk.to(tl.int64) * batch * heads + entry) * tokens
    if NEED_KEY:
        store_rows(token_key_parts + part_offset * DIM, dk, ids_at, tokens, DIM, 1, DIM, DIM_PAD, 1)
    if HAS_TOKEN_BIAS and NEED_VALUE:
        to_base = token_value_parts + part_offset * VALUE_DIM
        store_rows(to_base, dv, ids_at, tokens, VALUE_DIM, 1, VALUE_DIM, VALUE_PAD, 1)


@triton.jit
def add_token_rows(
    total, columns, token_ids, parts, entry, entries, chunks, tokens,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, TOKENS_PAD: tl.constexpr,
):  # fmt: skip
    """A tile [columns, D] and the rows of the tokens that lie in it; `parts` is float32 [chunks, entries, K, D]."""
    for start in range(0, tokens, TOKENS_PAD):
        ids_at = start + tl.arange(0, TOKENS_PAD)
        ids = tl.load(token_ids + ids_at, mask=ids_at < tokens, other=-1)
        hits = (columns[:, None] == ids[None, :]).to(tl.float32)
        if tl.sum(hits) > 0:
            found = tl.zeros((TOKENS_PAD, DIM_PAD), tl.float32)
            for chunk in range(chunks):
                base = parts + (chunk * entries + entry) * tokens * DIM
                found += load_rows(base, ids_at, tokens, DIM, 1, DIM, DIM_PAD, 1)
            total += tl.dot(hits, found, input_precision="ieee")
    return total


@triton.jit
def add_parts_kernel(
    parts, token_ids, token_parts, grad,
    grad_b, grad_h, grad_n, grad_d, batch, heads, keys, tokens, count, chunks, factor,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, GRAD_UNIT: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS_PAD: tl.constexpr, ADD_TOKENS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of keys, or values: `factor` times the sum of `count` parts, [count, B, H, M, D]."""
    tile, b, h = place_of(tl.cdiv(keys, COLUMNS), heads)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    entry, entries = b * heads + h, batch * heads
    total = tl.zeros((COLUMNS, DIM_PAD), tl.float32)
    for part in range(count):
        base = parts + (part * entries + entry) * keys * DIM
        total += load_rows(base, columns, keys, DIM, 1, DIM, DIM_PAD, 1)
    if ADD_TOKENS:
        total = add_token_rows(
            total, columns, token_ids + b * tokens, token_parts, entry, entries, chunks, tokens,
            DIM, DIM_PAD, TOKENS_PAD,
        )  # fmt: skip
    to_base = grad + offset_of(b, h, grad_b, grad_h, GRAD_UNIT)
    store_rows(to_base, total * factor, columns, keys, grad_n, grad_d, DIM, DIM_PAD, GRAD_UNIT)


@triton.jit
def token_bias_kernel(
    query, key, value, token_ids, key_bias, token_bias, log2_repeats, lse, grad_out, grad_maps, delta,
    grad_token_bias,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    grad_out_b, grad_out_h, grad_out_n, grad_out_d, token_bias_b, token_bias_k, token_bias_n,
    heads, queries, keys, tokens, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, GRAD_OUT_UNIT: tl.constexpr,
    ROWS: tl.constexpr, TOKENS_PAD: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_MAPS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HEAD_MEAN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradient of the bias of TOKENS_PAD tokens at a tile of rows: dS summed over the heads, one after another."""
    tiles = tl.cdiv(queries, ROWS)
    tile, b = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    ids_at = tl.program_id(1) * TOKENS_PAD + tl.arange(0, TOKENS_PAD)
    ids = load_token_ids(token_ids + b * tokens, ids_at, tokens)
    if HAS_KEY_BIAS:
        key_bias += b * keys
    token_bias += b * token_bias_b
    total = tl.zeros((ROWS, TOKENS_PAD), tl.float32)
    for head in range(heads):
        h = b * 0 + head  # in 64 bits, as offsets are counted
        entry = b * heads + h
        offsets = entry * queries + rows
        q_base = query + offset_of(b, h, query_b, query_h, QUERY_UNIT)
        k_base = key + offset_of(b, h, key_b, key_h, KEY_UNIT)
        q = load_rows(q_base, rows, queries, query_n, query_d, DIM, DIM_PAD, QUERY_UNIT)
        k = load_rows(k_base, ids, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, True)
        do = q
        v = k
        if HAS_OUT:
            do_base = grad_out + offset_of(b, h, grad_out_b, grad_out_h, GRAD_OUT_UNIT)
            v_base = value + offset_of(b, h, value_b, value_h, VALUE_UNIT)
            do = load_rows(do_base, rows, queries, grad_out_n, grad_out_d, VALUE_DIM, VALUE_PAD, GRAD_OUT_UNIT)
            v = load_rows(v_base, ids, keys, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT, True)
        lse2 = load_lse2(lse, offsets, rows < queries)
        row_delta = tl.load(delta + offsets, mask=rows < queries, other=0.0)
        map_base = grad_maps
        if HAS_MAPS:
            map_base = grad_maps + (b if HEAD_MEAN else entry) * tokens * queries
        ds, _ = token_score_grads(
            q, k, do, v, ids, ids_at, rows, lse2, row_delta, lse2, rows,
            key_bias, token_bias, log2_repeats + b * tokens, key_bias, map_base,
            token_bias_k, token_bias_n, heads, tokens, queries, scale, 0.0, 0.0,
            HAS_OUT, HAS_MAPS, HAS_KEY_BIAS, True, HEAD_MEAN, False, UPCAST,
        )  # fmt: skip
        total += ds
    offsets = (b * tokens + ids_at)[None, :] * queries + rows[:, None]
    inside = (ids_at[None, :] < tokens) & (rows[:, None] < queries)
    tl.store(grad_token_bias + offsets, total, mask=inside)
