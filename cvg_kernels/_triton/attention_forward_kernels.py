"""Forward kernels of the attention core.

    S' = S + m · band   or   S + key bias (+ token bias);   P = softmax(S');   out = P v;   maps = P[..., token_ids]

A program takes a tile of queries through all keys, a tile of keys at a time. Where keys are few it takes several heads in
turn and sums their maps in registers, for traffic is what counts there: the maps add 4·K bytes to a row of queries, a
second pass over the queries would add half of what attention itself moves. Nothing of captured tokens stands in the loop
over keys: their logits are one product with the gathered keys afterwards.

Logits are counted in base 2. Without a bias the running maximum is that of the bare products, so that an element costs
one fused multiply-add and one exponential; for that the factor has to be positive, and a query is turned round where
`scale` is not. Only the last tile of keys is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.primitives import (
    LN2,
    LOG2E,
    band_tile,
    dot,
    load_bias2,
    load_frames,
    load_rows,
    load_token_ids,
    offset_of,
    store_rows,
    token_logits2,
)


@triton.jit
def load_query(
    query, rows, queries, query_n, query_d, turn,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, UNIT: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """A tile of queries, times `turn`, which is −1 or 0, if TURNED: exact in every dtype."""
    q = load_rows(query, rows, queries, query_n, query_d, DIM, DIM_PAD, UNIT)
    if TURNED:
        q = (q.to(tl.float32) * turn).to(query.dtype.element_ty)
    return q


@triton.jit
def products(
    q, key, columns, keys, key_n, key_d,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr,
    MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Bare q kᵀ of a tile [rows, columns]; −∞ beyond the keys if MASK."""
    k = load_rows(key, columns, keys, key_n, key_d, DIM, DIM_PAD, UNIT, WHOLE)
    s = dot(q, tl.trans(k), UPCAST)
    if MASK and not WHOLE:
        s = tl.where(columns[None, :] < keys, s, float("-inf"))
    return s


@triton.jit
def weigh(
    s, m, top2, row_frames, columns, keys, loop_bias, key_frames, factor2, falloff2, strength,
    HAS_LOOP_BIAS: tl.constexpr, BAND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Unnormalised weights of a tile from its bare products, the new running maximum, and how much the old sums fade.

    The maximum is that of the bare products; under a bias or a band it is that of the logits, base 2.
    """
    if BAND:
        frames = load_frames(key_frames, columns, keys)
        s = s * factor2 + top2[:, None] * band_tile(row_frames, frames, falloff2, strength)
    if HAS_LOOP_BIAS:
        s = s * factor2 + load_bias2(loop_bias, columns, keys, WHOLE)[None, :]
    higher = tl.maximum(m, tl.max(s, 1))
    if HAS_LOOP_BIAS:
        base = tl.where(higher == float("-inf"), 0.0, higher)  # −∞ − (−∞) is no number
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
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The largest product of each row, and the first key that has it."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    top_at = tl.zeros((ROWS,), tl.int32)
    for start in range(0, keys // COLUMNS * COLUMNS, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        s = products(q, key, columns, keys, key_n, key_d, DIM, DIM_PAD, UNIT, True, True, UPCAST)
        top, top_at = higher_top(s, columns, keys, top, top_at)
    if TAIL:
        columns = keys // COLUMNS * COLUMNS + tl.arange(0, COLUMNS)
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
    p, m, fade = weigh(
        s, m, top2, row_frames, columns, keys, loop_bias, key_frames, factor2, falloff2, strength,
        HAS_LOOP_BIAS, BAND, WHOLE,
    )  # fmt: skip
    l = l * fade + tl.sum(p, 1)
    if HAS_VALUE:
        v = load_rows(value, columns, keys, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT, WHOLE)
        acc = acc * fade[:, None]
        acc += dot(p.to(v.dtype), v, UPCAST)
    return m, l, acc


@triton.jit
def add_tokens(
    q, key, value, m2, l, acc, token_ids, log2_repeats, key_bias, token_bias,
    rows, queries, tokens, key_n, key_d, value_n, value_d, token_bias_k, token_bias_n, factor,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, TOKENS_PAD: tl.constexpr,
    HAS_VALUE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maximum (base 2), sum and weighted values after the keys that have a token bias; a repeated key is shared out."""
    for start in range(0, tokens, TOKENS_PAD):
        ids_at = start + tl.arange(0, TOKENS_PAD)
        ids = load_token_ids(token_ids, ids_at, tokens)
        k = load_rows(key, ids, tokens, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, True)
        s = token_logits2(
            q, k, ids, ids_at, rows, key_bias, token_bias, token_bias_k, token_bias_n, tokens, queries, factor,
            HAS_KEY_BIAS, True, UPCAST,
        )  # fmt: skip
        repeats = tl.load(log2_repeats + ids_at, mask=ids_at < tokens, other=float("inf"))
        s -= repeats[None, :]  # ∞ beyond the tokens
        higher = tl.maximum(m2, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p, fade = tl.exp2(s - base[:, None]), tl.exp2(m2 - base)
        l = l * fade + tl.sum(p, 1)
        if HAS_VALUE:
            v = load_rows(value, ids, tokens, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT, True)
            acc = acc * fade[:, None]
            acc += dot(p.to(v.dtype), v, UPCAST)
        m2 = higher
    return m2, l, acc


@triton.jit
def captured(
    q, key, ids, ids_at, base2, top2, row_frames, key_bias, token_bias, key_frames,
    rows, queries, tokens, key_n, key_d, token_bias_k, token_bias_n, factor, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, KEY_UNIT: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, HAS_TOKEN_BIAS: tl.constexpr, BAND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """2^(S' − base2) of chosen keys, [rows, K]: their probabilities if base2 is the log-sum-exp of the rows."""
    k = load_rows(key, ids, tokens, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, True)
    s = token_logits2(
        q, k, ids, ids_at, rows, key_bias, token_bias, token_bias_k, token_bias_n, tokens, queries, factor,
        HAS_KEY_BIAS, HAS_TOKEN_BIAS, UPCAST,
    )  # fmt: skip
    if BAND:
        frames = tl.load(key_frames + ids)
        s += top2[:, None] * band_tile(row_frames, frames, falloff2, strength)
    return tl.exp2(s - base2[:, None])


@triton.jit
def forward_kernel(
    query, key, value, token_ids, key_bias, loop_bias, token_bias, log2_repeats, query_frames, key_frames,
    out, maps, lse, highest, place,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    out_b, out_h, out_n, out_d, token_bias_b, token_bias_k, token_bias_n,
    batch, heads, heads_each, queries, keys, tokens, factor, turn, falloff2, strength,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, REST: tl.constexpr, TOKENS_PAD: tl.constexpr, STAGES: tl.constexpr,
    HAS_VALUE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HAS_LOOP_BIAS: tl.constexpr,
    HAS_TOKEN_BIAS: tl.constexpr, BAND: tl.constexpr, TURNED: tl.constexpr, CAPTURE: tl.constexpr,
    HEAD_MEAN: tl.constexpr, LOOP_HEADS: tl.constexpr, FEW: tl.constexpr, TAIL: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Out and lse of a tile of rows, of one head or of `heads_each` heads in turn; with CAPTURE also their maps.

    FEW: all keys fit into one tile and REST columns more, which no loop goes through; the loop over heads is pipelined.
    """
    tiles = tl.cdiv(queries, ROWS)
    tile, entry = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    groups = tl.cdiv(heads, heads_each)
    b, group = entry // groups, entry % groups
    rows = tile * ROWS + tl.arange(0, ROWS)
    ids_at = tl.arange(0, TOKENS_PAD)
    ids = tl.zeros((TOKENS_PAD,), tl.int64)
    row_frames = tl.zeros((ROWS,), tl.int32)
    if HAS_LOOP_BIAS:
        loop_bias += b * keys
    if HAS_KEY_BIAS:
        key_bias += b * keys
    if HAS_TOKEN_BIAS:
        log2_repeats += b * tokens
        token_bias += b * token_bias_b
    if HAS_TOKEN_BIAS or CAPTURE:
        token_ids += b * tokens
    if CAPTURE:
        ids = load_token_ids(token_ids, ids_at, tokens)
    if BAND:
        row_frames = load_frames(query_frames, rows, queries)
    sums = tl.zeros((ROWS, TOKENS_PAD), tl.float32)
    first = group * heads_each
    last = first + 1
    if LOOP_HEADS:
        last = tl.minimum(first + heads_each, heads)

    for h in tl.range(first, last, num_stages=STAGES if FEW else 1):
        q_base = query + offset_of(b, h, query_b, query_h, QUERY_UNIT)
        k_base = key + offset_of(b, h, key_b, key_h, KEY_UNIT)
        v_base = k_base
        if HAS_VALUE:
            v_base = value + offset_of(b, h, value_b, value_h, VALUE_UNIT)
        q = load_query(q_base, rows, queries, query_n, query_d, turn, DIM, DIM_PAD, QUERY_UNIT, TURNED)
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, VALUE_PAD), tl.float32)
        top2 = m
        at = (b * heads + h) * queries + rows
        if BAND:
            top, top_at = find_top(
                q, k_base, keys, key_n, key_d, DIM, DIM_PAD, KEY_UNIT, ROWS, COLUMNS, TAIL, UPCAST
            )  # fmt: skip
            tl.store(place + at, top_at, mask=rows < queries)
            tl.store(highest + at, top * factor, mask=rows < queries)
            top2 = top * (factor * LOG2E)
        if FEW:
            m, l, acc = add_tile(
                q, k_base, v_base, m, l, acc, top2, row_frames, 0, keys, key_n, key_d, value_n, value_d,
                loop_bias, key_frames, factor * LOG2E, falloff2, strength,
                DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, KEY_UNIT, VALUE_UNIT, COLUMNS, REST > 0 or not TAIL,
                HAS_VALUE, HAS_LOOP_BIAS, BAND, UPCAST,
            )  # fmt: skip
            if REST > 0:
                m, l, acc = add_tile(
                    q, k_base, v_base, m, l, acc, top2, row_frames, COLUMNS, keys, key_n, key_d, value_n, value_d,
                    loop_bias, key_frames, factor * LOG2E, falloff2, strength,
                    DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, KEY_UNIT, VALUE_UNIT, REST, not TAIL,
                    HAS_VALUE, HAS_LOOP_BIAS, BAND, UPCAST,
                )  # fmt: skip
        else:
            for start in range(0, keys // COLUMNS * COLUMNS, COLUMNS):
                m, l, acc = add_tile(
                    q, k_base, v_base, m, l, acc, top2, row_frames, start, keys, key_n, key_d, value_n, value_d,
                    loop_bias, key_frames, factor * LOG2E, falloff2, strength,
                    DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, KEY_UNIT, VALUE_UNIT, COLUMNS, True,
                    HAS_VALUE, HAS_LOOP_BIAS, BAND, UPCAST,
                )  # fmt: skip
            if TAIL:
                m, l, acc = add_tile(
                    q, k_base, v_base, m, l, acc, top2, row_frames, keys // COLUMNS * COLUMNS, keys,
                    key_n, key_d, value_n, value_d,
                    loop_bias, key_frames, factor * LOG2E, falloff2, strength,
                    DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, KEY_UNIT, VALUE_UNIT, COLUMNS, False,
                    HAS_VALUE, HAS_LOOP_BIAS, BAND, UPCAST,
                )  # fmt: skip
        if not (HAS_LOOP_BIAS or BAND):
            m *= factor * LOG2E
        if HAS_TOKEN_BIAS:
            m, l, acc = add_tokens(
                q, k_base, v_base, m, l, acc, token_ids, log2_repeats, key_bias, token_bias,
                rows, queries, tokens, key_n, key_d, value_n, value_d, token_bias_k, token_bias_n, factor,
                DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, KEY_UNIT, VALUE_UNIT, TOKENS_PAD,
                HAS_VALUE, HAS_KEY_BIAS, UPCAST,
            )  # fmt: skip

        tl.store(lse + at, m * LN2 + tl.log(l), mask=rows < queries)
        share = tl.where(l > 0, 1.0 / l, 0.0)
        if HAS_VALUE:
            o_base = out + offset_of(b, h, out_b, out_h, OUT_UNIT)
            store_rows(
                o_base, acc * share[:, None], rows, queries, out_n, out_d, VALUE_DIM, VALUE_PAD, OUT_UNIT
            )  # fmt: skip
        if CAPTURE:
            base2 = tl.where(m == float("-inf"), 0.0, m) if HAS_LOOP_BIAS else m
            c = captured(
                q, k_base, ids, ids_at, base2, top2, row_frames, key_bias, token_bias, key_frames,
                rows, queries, tokens, key_n, key_d, token_bias_k, token_bias_n, factor, falloff2, strength,
                DIM, DIM_PAD, KEY_UNIT, HAS_KEY_BIAS, HAS_TOKEN_BIAS, BAND, UPCAST,
            )  # fmt: skip
            sums += c * share[:, None]

    if CAPTURE:
        if HEAD_MEAN:
            sums /= heads
        entry = group * batch + b if HEAD_MEAN else b * groups + group
        store_maps(maps, sums, entry, ids_at, rows, tokens, queries)


@triton.jit
def store_maps(maps, sums, entry, ids_at, rows, tokens, queries):
    """A tile [rows, K] into entry `entry` of maps [entries, tokens, queries]."""
    at = (entry * tokens + ids_at)[None, :] * queries + rows[:, None]
    tl.store(maps + at, sums, mask=(ids_at[None, :] < tokens) & (rows[:, None] < queries))


@triton.jit
def capture_kernel(
    query, key, token_ids, key_bias, token_bias, query_frames, key_frames, maps, lse, highest,
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
        at = (b * heads + h) * queries + rows
        lse2 = tl.load(lse + at, mask=rows < queries, other=0.0) * LOG2E
        top2 = lse2
        if BAND:
            top2 = tl.load(highest + at, mask=rows < queries, other=0.0) * LOG2E
        base2 = tl.where(lse2 == float("-inf"), 0.0, lse2) if HAS_LOOP_BIAS else lse2
        c = captured(
            q, key + offset_of(b, h, key_b, key_h, KEY_UNIT), ids, ids_at, base2, top2, row_frames,
            key_bias, token_bias, key_frames,
            rows, queries, tokens, key_n, key_d, token_bias_k, token_bias_n, scale, falloff2, strength,
            DIM, DIM_PAD, KEY_UNIT, HAS_KEY_BIAS, HAS_TOKEN_BIAS, BAND, UPCAST,
        )  # fmt: skip
        sums += tl.where((lse2 == float("-inf"))[:, None], 0.0, c) if HAS_LOOP_BIAS else c
    if HEAD_MEAN:
        sums /= heads
    entry = group * batch + b if HEAD_MEAN else b * groups + group
    store_maps(maps, sums, entry, ids_at, rows, tokens, queries)


@triton.jit
def add_maps_kernel(parts, maps, count, numbers, BLOCK: tl.constexpr):
    """Sums `count` maps of `numbers` numbers each, in order: the shares that groups of heads have in a mean."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + part * numbers + at, mask=at < numbers, other=0.0)
    tl.store(maps + at, total, mask=at < numbers)
