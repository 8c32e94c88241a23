"""Backward kernels of the attention core: a program per tile of queries, or per tile of keys.

    δ  = Σ_d dO·O + Σ_κ dC·C − dlse
    dS' = P ∘ (dO vᵀ − δ) + (C ∘ dC at the columns of the tokens)
    dq = scale · dS k,  dk = scale · dSᵀ q,  dv = Pᵀ dO

Without a band dS = dS'. With one, where a gradient flows through m, t = Σ_j band · dS' is added at the place of m.

Nothing of captured tokens stands in a loop over keys or queries: C ∘ dC is a product with the gathered keys of its own
(`attention_backward_token_kernels`), so that every loop is plain flash attention with asynchronous loads. Keys with a
token bias have the bias −∞ in the loops, P = 0, and come in whole from outside. `scale` multiplies the finished sums:
dS of small gradients would leave the range of float16 otherwise. Only the last, narrower tile of keys is masked; rows
without keys, whose lse is −∞, have the lse ∞ here, and so the weights 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.attention_backward_token_kernels import (
    load_lse2,
    load_map_grads,
    token_probabilities,
    token_score_grads,
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
    store_rows,
)


@triton.jit
def add_keys(
    q, do, key, value, dq, t, lse2, row_delta, top2, row_frames, start, keys, key_n, key_d, value_n, value_d,
    loop_bias, key_frames, scale, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_LOOP_BIAS: tl.constexpr, BAND: tl.constexpr, THROUGH_MAX: tl.constexpr,
    NEED_QUERY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Dq / scale and t of a tile of rows after one more tile of keys."""
    columns = start + tl.arange(0, COLUMNS)
    k = load_rows(key, columns, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, WHOLE)
    s = dot(q, tl.trans(k), UPCAST) * (scale * LOG2E)
    if BAND:
        band = band_tile(row_frames, load_frames(key_frames, columns, keys), falloff2, strength)
        s += top2[:, None] * band
    if HAS_LOOP_BIAS:
        s += load_bias2(loop_bias, columns, keys, WHOLE)[None, :]
    elif not WHOLE:
        s = tl.where(columns[None, :] < keys, s, float("-inf"))
    p = tl.exp2(s - lse2[:, None])
    if HAS_OUT:
        v = load_rows(value, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT, WHOLE)
        ds = p * (dot(do, tl.trans(v), UPCAST) - row_delta[:, None])
    else:
        ds = -p * row_delta[:, None]
    if THROUGH_MAX:
        t += tl.sum(band * ds, 1)
    if NEED_QUERY:
        dq += dot(ds.to(k.dtype), k, UPCAST)
    return dq, t


@triton.jit
def row_kernel(
    query, key, value, token_ids, key_bias, loop_bias, token_bias, log2_repeats, query_frames, key_frames,
    out, lse, row_max, row_argmax, grad_out, grad_maps, grad_lse, delta, through_max, grad_query,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    out_b, out_h, out_n, out_d, grad_out_b, grad_out_h, grad_out_n, grad_out_d,
    grad_query_b, grad_query_h, grad_query_n, grad_query_d, token_bias_b, token_bias_k, token_bias_n,
    heads, queries, keys, tokens, scale, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    GRAD_OUT_UNIT: tl.constexpr, GRAD_QUERY_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr, TOKENS_PAD: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_MAPS: tl.constexpr, HAS_LSE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
    HAS_LOOP_BIAS: tl.constexpr, HAS_TOKEN_BIAS: tl.constexpr, HEAD_MEAN: tl.constexpr, BAND: tl.constexpr,
    THROUGH_MAX: tl.constexpr, NEED_QUERY: tl.constexpr, KEEP_DELTA: tl.constexpr, PEEL: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """δ of a tile of rows, kept if KEEP_DELTA; t if THROUGH_MAX; dq if NEED_QUERY.

    PEEL: the last tile of keys, of REST columns, stands apart and alone is masked.
    """
    tile, b, h = place_of(tl.cdiv(queries, ROWS), heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < queries
    entry = b * heads + h
    row_offsets = entry * queries + rows
    q_base = query + offset_of(b, h, query_b, query_h, QUERY_UNIT)
    k_base = key + offset_of(b, h, key_b, key_h, KEY_UNIT)
    v_base = k_base
    q = load_rows(q_base, rows, queries, query_n, query_d, DIM, DIM_PAD, QUERY_UNIT)
    lse2 = load_lse2(lse, row_offsets, inside)
    row_delta = tl.zeros((ROWS,), tl.float32)
    t = tl.zeros((ROWS,), tl.float32)
    dq = tl.zeros((ROWS, DIM_PAD), tl.float32)
    do = q
    top2 = lse2
    row_frames = tl.zeros((ROWS,), tl.int32)
    if HAS_LOOP_BIAS:
        loop_bias += b * keys
    if HAS_KEY_BIAS:
        key_bias += b * keys
    if HAS_TOKEN_BIAS:
        log2_repeats += b * tokens
        token_bias += b * token_bias_b
    if HAS_MAPS or HAS_TOKEN_BIAS:
        token_ids += b * tokens
    if HAS_MAPS:
        grad_maps += (b if HEAD_MEAN else entry) * tokens * queries
    if BAND:
        top2 = tl.load(row_max + row_offsets, mask=inside, other=0.0) * LOG2E
        row_frames = load_frames(query_frames, rows, queries)
    if HAS_OUT:
        v_base = value + offset_of(b, h, value_b, value_h, VALUE_UNIT)
        do_base = grad_out + offset_of(b, h, grad_out_b, grad_out_h, GRAD_OUT_UNIT)
        o_base = out + offset_of(b, h, out_b, out_h, OUT_UNIT)
        do = load_rows(do_base, rows, queries, grad_out_n, grad_out_d, VALUE_DIM, VALUE_PAD, GRAD_OUT_UNIT)
        o = load_rows(o_base, rows, queries, out_n, out_d, VALUE_DIM, VALUE_PAD, OUT_UNIT)
        row_delta += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_LSE:
        row_delta -= tl.load(grad_lse + row_offsets, mask=inside, other=0.0)

    if HAS_MAPS:
        for start in range(0, tokens, TOKENS_PAD):
            ids_at = start + tl.arange(0, TOKENS_PAD)
            ids = load_token_ids(token_ids, ids_at, tokens)
            k = load_rows(k_base, ids, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, True)
            c, band = token_probabilities(
                q, k, ids, ids_at, rows, lse2, top2, row_frames, key_bias, token_bias, key_frames,
                token_bias_k, token_bias_n, tokens, queries, scale, falloff2, strength,
                HAS_KEY_BIAS, HAS_TOKEN_BIAS, BAND, UPCAST,
            )  # fmt: skip
            weighted = c * load_map_grads(grad_maps, ids_at, rows, tokens, queries, heads, HEAD_MEAN)
            row_delta += tl.sum(weighted, 1)
            if THROUGH_MAX:
                t += tl.sum(weighted * band, 1)
            if NEED_QUERY and not HAS_TOKEN_BIAS:
                dq += dot(weighted.to(k.dtype), k, UPCAST)
    if KEEP_DELTA:
        tl.store(delta + row_offsets, row_delta, mask=inside)
    if HAS_TOKEN_BIAS and NEED_QUERY:
        for start in range(0, tokens, TOKENS_PAD):
            ids_at = start + tl.arange(0, TOKENS_PAD)
            ids = load_token_ids(token_ids, ids_at, tokens)
            k = load_rows(k_base, ids, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, True)
            v = k
            if HAS_OUT:
                v = load_rows(v_base, ids, keys, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT, True)
            ds, _ = token_score_grads(
                q, k, do, v, ids, ids_at, rows, lse2, row_delta, top2, row_frames,
                key_bias, token_bias, log2_repeats, key_frames, grad_maps,
                token_bias_k, token_bias_n, heads, tokens, queries, scale, falloff2, strength,
                HAS_OUT, HAS_MAPS, HAS_KEY_BIAS, HAS_TOKEN_BIAS, HEAD_MEAN, BAND, UPCAST,
            )  # fmt: skip
            dq += dot(ds.to(k.dtype), k, UPCAST)

    if NEED_QUERY or THROUGH_MAX:
        end = keys
        if PEEL:
            end = keys // COLUMNS * COLUMNS
        for start in range(0, end, COLUMNS):
            dq, t = add_keys(
                q, do, k_base, v_base, dq, t, lse2, row_delta, top2, row_frames, start, keys,
                key_n, key_d, value_n, value_d, loop_bias, key_frames, scale, falloff2, strength,
                DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, KEY_UNIT, VALUE_UNIT, COLUMNS, PEEL,
                HAS_OUT, HAS_LOOP_BIAS, BAND, THROUGH_MAX, NEED_QUERY, UPCAST,
            )  # fmt: skip
        if REST > 0:
            dq, t = add_keys(
                q, do, k_base, v_base, dq, t, lse2, row_delta, top2, row_frames, keys // COLUMNS * COLUMNS, keys,
                key_n, key_d, value_n, value_d, loop_bias, key_frames, scale, falloff2, strength,
                DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, KEY_UNIT, VALUE_UNIT, REST, False,
                HAS_OUT, HAS_LOOP_BIAS, BAND, THROUGH_MAX, NEED_QUERY, UPCAST,
            )  # fmt: skip
        if THROUGH_MAX:
            tl.store(through_max + row_offsets, t, mask=inside)
        if NEED_QUERY:
            if THROUGH_MAX:
                top_at = tl.load(row_argmax + row_offsets, mask=inside, other=0)
                k = load_rows(k_base, top_at, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT)
                dq += t[:, None] * k.to(tl.float32)
            to_base = grad_query + offset_of(b, h, grad_query_b, grad_query_h, GRAD_QUERY_UNIT)
            store_rows(
                to_base, dq * scale, rows, queries, grad_query_n, grad_query_d, DIM, DIM_PAD, GRAD_QUERY_UNIT
            )  # fmt: skip


@triton.jit
def key_kernel(
    query, key, value, loop_bias, query_frames, key_frames, lse, row_max, row_argmax,
    grad_out, delta, through_max, grad_key, grad_value,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    grad_out_b, grad_out_h, grad_out_n, grad_out_d,
    grad_key_b, grad_key_h, grad_key_n, grad_key_d, grad_value_b, grad_value_h, grad_value_n, grad_value_d,
    batch, heads, queries, keys, rows_each, scale, key_factor, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, GRAD_OUT_UNIT: tl.constexpr,
    GRAD_KEY_UNIT: tl.constexpr, GRAD_VALUE_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_OUT: tl.constexpr, HAS_LOOP_BIAS: tl.constexpr,
    BAND: tl.constexpr, THROUGH_MAX: tl.constexpr,
    NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`key_factor` times Σ_i dS_ij q_i, and dv, of a tile of keys, from `rows_each` queries.

    The grid's second axis goes over parts of the queries, whose sums lie one after another in `grad_key` and
    `grad_value`; the strides are those of one part. `add_parts_kernel` adds them up.
    """
    tile, b, h = place_of(tl.cdiv(keys, COLUMNS), heads)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    entry = b * heads + h
    part = tl.program_id(1)
    q_base = query + offset_of(b, h, query_b, query_h, QUERY_UNIT)
    do_base = q_base
    k_base = key + offset_of(b, h, key_b, key_h, KEY_UNIT)
    k = load_rows(k_base, columns, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT)
    v = k
    if HAS_OUT:
        do_base = grad_out + offset_of(b, h, grad_out_b, grad_out_h, GRAD_OUT_UNIT)
        if NEED_KEY:
            v_base = value + offset_of(b, h, value_b, value_h, VALUE_UNIT)
            v = load_rows(v_base, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT)
    bias2 = tl.zeros((COLUMNS,), tl.float32)
    if HAS_LOOP_BIAS:
        bias2 = load_bias2(loop_bias + b * keys, columns, keys, False)
    column_frames = columns
    if BAND:
        column_frames = load_frames(key_frames, columns, keys)
    dk = tl.zeros((COLUMNS, DIM_PAD), tl.float32)
    dv = tl.zeros((COLUMNS, VALUE_PAD), tl.float32)
    last = tl.minimum(part * rows_each + rows_each, queries)
    for start in range(part * rows_each, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < queries
        row_offsets = entry * queries + rows
        q = load_rows(q_base, rows, queries, query_n, query_d, DIM, DIM_PAD, QUERY_UNIT)
        lse2 = load_lse2(lse, row_offsets, inside)
        s = dot(k, tl.trans(q), UPCAST) * (scale * LOG2E)
        if BAND:
            top2 = tl.load(row_max + row_offsets, mask=inside, other=0.0) * LOG2E
            row_frames = load_frames(query_frames, rows, queries)
            s += top2[None, :] * band_tile(column_frames, row_frames, falloff2, strength)
        if HAS_LOOP_BIAS:
            s += bias2[:, None]
        p = tl.exp2(s - lse2[None, :])  # transposed: [columns, rows]
        if HAS_OUT:
            do = load_rows(do_base, rows, queries, grad_out_n, grad_out_d, VALUE_DIM, VALUE_PAD, GRAD_OUT_UNIT)
        if NEED_VALUE:
            dv += dot(p.to(do.dtype), do, UPCAST)
        if NEED_KEY:
            row_delta = tl.load(delta + row_offsets, mask=inside, other=0.0)
            if HAS_OUT:
                ds = p * (dot(v, tl.trans(do), UPCAST) - row_delta[None, :])
            else:
                ds = -p * row_delta[None, :]
            if THROUGH_MAX:
                t = tl.load(through_max + row_offsets, mask=inside, other=0.0)
                top_at = tl.load(row_argmax + row_offsets, mask=inside, other=-1)
                ds += tl.where(top_at[None, :] == columns[:, None], t[None, :], 0.0)
            dk += dot(ds.to(q.dtype), q, UPCAST)

    part_entries = part.to(tl.int64) * batch * heads
    if NEED_VALUE:
        to_base = grad_value + part_entries * keys * VALUE_DIM
        to_base += offset_of(b, h, grad_value_b, grad_value_h, GRAD_VALUE_UNIT)
        store_rows(
            to_base, dv, columns, keys, grad_value_n, grad_value_d, VALUE_DIM, VALUE_PAD, GRAD_VALUE_UNIT
        )  # fmt: skip
    if NEED_KEY:
        to_base = grad_key + part_entries * keys * DIM
        to_base += offset_of(b, h, grad_key_b, grad_key_h, GRAD_KEY_UNIT)
        store_rows(
            to_base, dk * key_factor, columns, keys, grad_key_n, grad_key_d, DIM, DIM_PAD, GRAD_KEY_UNIT
        )  # fmt: skip
