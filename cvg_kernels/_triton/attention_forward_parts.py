"""What the forward kernels of the attention core share: scores of tiles, tokens with a bias, captured tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.primitives import (
    LN2,
    dot,
    load_rows,
    load_token_ids,
    store_rows,
    token_logits2,
    token_scores2,
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
def add_tokens(
    q, key, value, m2, l, acc, token_ids, log2_repeats, key_bias, token_bias,
    rows, queries, tokens, key_n, key_d, value_n, value_d, token_bias_k, token_bias_n, factor,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, TOKENS_PAD: tl.constexpr,
    HAS_VALUE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maximum (base 2), sum and weighted values after the keys that have a token bias;
    a repeated key is shared out.
    """
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
        base = safe_base(higher, True)
        p, rescale = tl.exp2(s - base[:, None]), tl.exp2(m2 - base)
        l = l * rescale + tl.sum(p, 1)
        if HAS_VALUE:
            v = load_rows(value, ids, tokens, value_n, value_d, VALUE_DIM, VALUE_PAD, VALUE_UNIT, True)
            acc = acc * rescale[:, None]
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
    s, _ = token_scores2(
        q, k, ids, ids_at, rows, top2, row_frames, key_bias, token_bias, key_frames,
        token_bias_k, token_bias_n, tokens, queries, factor, falloff2, strength,
        HAS_KEY_BIAS, HAS_TOKEN_BIAS, BAND, UPCAST,
    )  # fmt: skip
    return tl.exp2(s - base2[:, None])


@triton.jit
def finish_head(
    m2, l, acc, out, lse, rows, queries, out_n, out_d,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, OUT_UNIT: tl.constexpr, HAS_VALUE: tl.constexpr,
):  # fmt: skip
    """Writes lse and out of a tile of rows of a head; returns 1 / l, 0 in rows without keys."""
    tl.store(lse + rows, m2 * LN2 + tl.log(l), mask=rows < queries)
    inverse_l = tl.where(l > 0, 1.0 / l, 0.0)
    if HAS_VALUE:
        store_rows(out, acc * inverse_l[:, None], rows, queries, out_n, out_d, VALUE_DIM, VALUE_PAD, OUT_UNIT)
    return inverse_l


@triton.jit
def safe_base(m2, MASKED: tl.constexpr):
    """The maximum of rows, base 2; 0 for those without keys, where rows may be MASKED: −∞ − (−∞) is no number."""
    if MASKED:
        m2 = tl.where(m2 == float("-inf"), 0.0, m2)
    return m2


@triton.jit
def store_maps(maps, sums, entry, ids_at, rows, tokens, queries):
    """A tile [rows, K] into entry `entry` of maps [entries, tokens, queries]."""
    offsets = (entry * tokens + ids_at)[None, :] * queries + rows[:, None]
    tl.store(maps + offsets, sums, mask=(ids_at[None, :] < tokens) & (rows[:, None] < queries))
