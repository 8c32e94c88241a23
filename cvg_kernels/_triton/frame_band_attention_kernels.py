"""Kernels of attention with a band by frame distance.

    S' = S + m · band,   S = scale · q kᵀ,   m = max_j S,   band = strength · exp(−(f_i − f_j)² / 2σ²)

The keys pass by twice in the forward kernel: once for m, once as in flash attention. The backward pass has two kernels:

    δ = Σ_d dO·O − dlse,   dS' = scale · P ∘ (dO vᵀ − δ),   t = Σ_j band · dS',   dS = dS' + t at the place of m
    dq = dS k            (row_kernel: a program per query tile; it also keeps δ and t)
    dk = dSᵀ q,  dv = Pᵀ dO     (key_kernel: a program per key tile)

Logits are counted in base 2 inside; m as kept in memory is S itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.primitives import LN2, LOG2E, dot, load_rows, probabilities


@triton.jit
def load_frames(frames, at, length):
    """Frames of a tile of tokens, −1 outside."""
    return tl.load(frames + at, mask=at < length, other=-1)


@triton.jit
def band_tile(row_frames, column_frames, falloff2, strength):
    """Strength · 2^(falloff2 · (f_i − f_j)²) of a tile [rows, columns], 0 where a token belongs to no frame."""
    distance = (row_frames[:, None] - column_frames[None, :]).to(tl.float32)
    inside = (row_frames[:, None] >= 0) & (column_frames[None, :] >= 0)
    return tl.where(inside, strength * tl.exp2(falloff2 * distance * distance), 0.0)


@triton.jit
def plain_logits2(q, k, columns, keys, scale, UPCAST: tl.constexpr):
    """log₂e · S of a tile [rows, columns]; −∞ beyond the keys."""
    s = dot(q, tl.trans(k), UPCAST) * (scale * LOG2E)
    return tl.where(columns[None, :] < keys, s, float("-inf"))


@triton.jit
def store_strided(base, tile, rows, length, row_stride, dim_stride, DIM: tl.constexpr, DIM_PAD: tl.constexpr):  # fmt: skip
    """A tile [rows, DIM_PAD] into a strided [length, DIM] matrix, in its dtype."""
    dims = tl.arange(0, DIM_PAD)
    at = rows.to(tl.int64)[:, None] * row_stride + dims[None, :] * dim_stride
    inside = (rows[:, None] < length) & (dims[None, :] < DIM)
    tl.store(base + at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def frame_band_forward_kernel(
    query, key, value, query_frames, key_frames, out, lse, highest, place,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    out_b, out_h, out_n, out_d, heads, queries, keys, scale, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Out = softmax(S') v, lse, m and its place."""
    tiles = tl.cdiv(queries, ROWS)
    tile, entry = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = entry // heads, entry % heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    q = load_rows(query + b * query_b + h * query_h, rows, queries, query_n, query_d, DIM, DIM_PAD)
    k_base, v_base = key + b * key_b + h * key_h, value + b * value_b + h * value_h

    top = tl.full((ROWS,), float("-inf"), tl.float32)  # m, base 2
    top_at = tl.zeros((ROWS,), tl.int32)
    for start in range(0, keys, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = load_rows(k_base, columns, keys, key_n, key_d, DIM, DIM_PAD)
        s = plain_logits2(q, k, columns, keys, scale, UPCAST)
        most = tl.max(s, 1)
        first = tl.min(tl.where(s == most[:, None], columns[None, :], keys), 1)
        top_at = tl.where(most > top, first, top_at)
        top = tl.maximum(top, most)

    row_frames = load_frames(query_frames, rows, queries)
    m = tl.full((ROWS,), float("-inf"), tl.float32)  # running maximum of S', base 2
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_PAD), tl.float32)
    for start in range(0, keys, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        k = load_rows(k_base, columns, keys, key_n, key_d, DIM, DIM_PAD)
        band = band_tile(row_frames, load_frames(key_frames, columns, keys), falloff2, strength)
        s = plain_logits2(q, k, columns, keys, scale, UPCAST) + top[:, None] * band
        higher = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        fade = tl.exp2(m - higher)
        l = l * fade + tl.sum(p, 1)
        v = load_rows(v_base, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD)
        acc = acc * fade[:, None] + dot(p.to(v.dtype), v, UPCAST)
        m = higher

    at = entry * queries + rows
    tl.store(lse + at, m * LN2 + tl.log(l), mask=rows < queries)
    tl.store(highest + at, top * LN2, mask=rows < queries)
    tl.store(place + at, top_at, mask=rows < queries)
    o_base = out + b * out_b + h * out_h
    store_strided(o_base, acc / l[:, None], rows, queries, out_n, out_d, VALUE_DIM, VALUE_PAD)


@triton.jit
def weights_and_grads(
    q, k, do, v, band, columns, row_lse, row_top, row_delta, keys, scale,
    HAS_OUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P and dS' of a tile [rows, columns], float32."""
    s = plain_logits2(q, k, columns, keys, scale, UPCAST) + (row_top * LOG2E)[:, None] * band
    p = probabilities(s, row_lse)
    dp = tl.zeros_like(p)
    if HAS_OUT:
        dp = dot(do, tl.trans(v), UPCAST)
    return p, p * (dp - row_delta[:, None]) * scale


@triton.jit
def frame_band_row_kernel(
    query, key, value, query_frames, key_frames, out, lse, highest, place, grad_out, grad_lse, delta, through_max,
    grad_query,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    out_b, out_h, out_n, out_d, grad_b, grad_h, grad_n, grad_d, to_query_b, to_query_h, to_query_n, to_query_d,
    heads, queries, keys, scale, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_OUT: tl.constexpr, HAS_LSE: tl.constexpr,
    ROW_MAX_GRAD: tl.constexpr, NEED_QUERY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """δ, t and dq of a tile of rows."""
    tiles = tl.cdiv(queries, ROWS)
    tile, entry = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = entry // heads, entry % heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    at = entry * queries + rows
    q = load_rows(query + b * query_b + h * query_h, rows, queries, query_n, query_d, DIM, DIM_PAD)
    k_base, v_base = key + b * key_b + h * key_h, value + b * value_b + h * value_h
    row_delta = tl.zeros((ROWS,), tl.float32)
    do = q
    if HAS_OUT:
        do_base, o_base = grad_out + b * grad_b + h * grad_h, out + b * out_b + h * out_h
        do = load_rows(do_base, rows, queries, grad_n, grad_d, VALUE_DIM, VALUE_PAD)
        o = load_rows(o_base, rows, queries, out_n, out_d, VALUE_DIM, VALUE_PAD)
        row_delta += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_LSE:
        row_delta -= tl.load(grad_lse + at, mask=rows < queries, other=0.0)
    tl.store(delta + at, row_delta, mask=rows < queries)

    if ROW_MAX_GRAD or NEED_QUERY:
        row_frames = load_frames(query_frames, rows, queries)
        row_lse = tl.load(lse + at, mask=rows < queries, other=float("-inf"))
        row_top = tl.load(highest + at, mask=rows < queries, other=0.0)
        t = tl.zeros((ROWS,), tl.float32)
        dq = tl.zeros((ROWS, DIM_PAD), tl.float32)
        for start in range(0, keys, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            k = load_rows(k_base, columns, keys, key_n, key_d, DIM, DIM_PAD)
            v = k
            if HAS_OUT:
                v = load_rows(v_base, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD)
            band = band_tile(row_frames, load_frames(key_frames, columns, keys), falloff2, strength)
            _, ds = weights_and_grads(
                q, k, do, v, band, columns, row_lse, row_top, row_delta, keys, scale, HAS_OUT, UPCAST
            )  # fmt: skip
            t += tl.sum(band * ds, 1)
            if NEED_QUERY:
                dq += dot(ds.to(k.dtype), k, UPCAST)
        if ROW_MAX_GRAD:
            tl.store(through_max + at, t, mask=rows < queries)
        if NEED_QUERY:
            if ROW_MAX_GRAD:
                top_at = tl.load(place + at, mask=rows < queries, other=0)
                k = load_rows(k_base, top_at, keys, key_n, key_d, DIM, DIM_PAD)
                dq += t[:, None] * k.to(tl.float32)
            to_base = grad_query + b * to_query_b + h * to_query_h
            store_strided(to_base, dq, rows, queries, to_query_n, to_query_d, DIM, DIM_PAD)


@triton.jit
def frame_band_key_kernel(
    query, key, value, query_frames, key_frames, lse, highest, place, grad_out, delta, through_max,
    grad_key, grad_value,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    grad_b, grad_h, grad_n, grad_d, to_key_b, to_key_h, to_key_n, to_key_d,
    to_value_b, to_value_h, to_value_n, to_value_d, heads, queries, keys, scale, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_OUT: tl.constexpr, ROW_MAX_GRAD: tl.constexpr,
    NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Dk = Σ_i dS_ij q_i and dv = Σ_i P_ij dO_i of a tile of keys."""
    tiles = tl.cdiv(keys, COLUMNS)
    tile, entry = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    b, h = entry // heads, entry % heads
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    k = load_rows(key + b * key_b + h * key_h, columns, keys, key_n, key_d, DIM, DIM_PAD)
    v = k
    if HAS_OUT:
        v_base = value + b * value_b + h * value_h
        v = load_rows(v_base, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD)
    column_frames = load_frames(key_frames, columns, keys)
    dk = tl.zeros((COLUMNS, DIM_PAD), tl.float32)
    dv = tl.zeros((COLUMNS, VALUE_PAD), tl.float32)
    for start in range(0, queries, ROWS):
        rows = start + tl.arange(0, ROWS)
        at = entry * queries + rows
        q_base = query + b * query_b + h * query_h
        q = load_rows(q_base, rows, queries, query_n, query_d, DIM, DIM_PAD)
        do = q
        if HAS_OUT:
            do_base = grad_out + b * grad_b + h * grad_h
            do = load_rows(do_base, rows, queries, grad_n, grad_d, VALUE_DIM, VALUE_PAD)
        row_lse = tl.load(lse + at, mask=rows < queries, other=float("-inf"))
        row_top = tl.load(highest + at, mask=rows < queries, other=0.0)
        row_delta = tl.load(delta + at, mask=rows < queries, other=0.0)
        row_frames = load_frames(query_frames, rows, queries)
        band = band_tile(row_frames, column_frames, falloff2, strength)
        p, ds = weights_and_grads(
            q, k, do, v, band, columns, row_lse, row_top, row_delta, keys, scale, HAS_OUT, UPCAST
        )
        if ROW_MAX_GRAD:
            t = tl.load(through_max + at, mask=rows < queries, other=0.0)
            top_at = tl.load(place + at, mask=rows < queries, other=-1)
            ds += tl.where(top_at[:, None] == columns[None, :], t[:, None], 0.0)
        if NEED_VALUE:
            dv += dot(tl.trans(p.to(do.dtype)), do, UPCAST)
        if NEED_KEY:
            dk += dot(tl.trans(ds.to(q.dtype)), q, UPCAST)
    if NEED_KEY:
        to_base = grad_key + b * to_key_b + h * to_key_h
        store_strided(to_base, dk, columns, keys, to_key_n, to_key_d, DIM, DIM_PAD)
    if NEED_VALUE:
        to_base = grad_value + b * to_value_b + h * to_value_h
        store_strided(to_base, dv, columns, keys, to_value_n, to_value_d, VALUE_DIM, VALUE_PAD)
