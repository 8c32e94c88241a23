"""Small pieces that the attention kernels share. Logits are counted in base 2, as `exp2` takes them."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """A · b with float32 accumulation; float32 inputs are multiplied exactly as float32.

    UPCAST widens low-precision inputs first: the interpreter's own low-precision arithmetic is not to be trusted.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def place_of(tile_count, heads):
    """Tile, sample and head of the program, of a grid of samples × heads × tiles; sample and head in 64 bits."""
    tile, entry = tl.program_id(0) % tile_count, (tl.program_id(0) // tile_count).to(tl.int64)
    return tile, entry // heads, entry % heads


@triton.jit
def offset_of(b, h, stride_b, stride_h, UNIT: tl.constexpr):
    """Where the rows of a head begin, from strides in units; `b` and `h` are of 64 bits."""
    return (b * stride_b + h * stride_h) * UNIT


@triton.jit
def load_rows(
    base, rows, length, row_stride, dim_stride,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Rows of a strided [length, DIM] matrix as a tile [rows, DIM_PAD], zero outside; WHOLE: all rows are inside."""
    dims = tl.arange(0, DIM_PAD)
    offsets = rows.to(tl.int64)[:, None] * row_stride * UNIT + dims[None, :] * dim_stride
    if WHOLE:
        if DIM == DIM_PAD:
            return tl.load(base + offsets)
        else:
            return tl.load(base + offsets, mask=dims[None, :] < DIM, other=0.0)
    else:
        inside = (rows[:, None] < length) & (dims[None, :] < DIM)
        return tl.load(base + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(
    base, tile, rows, length, row_stride, dim_stride,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A tile [rows, DIM_PAD] into a strided [length, DIM] matrix, in its dtype."""
    dims = tl.arange(0, DIM_PAD)
    offsets = rows.to(tl.int64)[:, None] * row_stride * UNIT + dims[None, :] * dim_stride
    inside = (rows[:, None] < length) & (dims[None, :] < DIM)
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_bias2(bias, columns, keys, WHOLE: tl.constexpr):
    """log₂e · bias of a tile of keys; −∞ beyond them unless WHOLE."""
    if WHOLE:
        return tl.load(bias + columns) * LOG2E
    else:
        return tl.load(bias + columns, mask=columns < keys, other=float("-inf")) * LOG2E


@triton.jit
def load_token_ids(token_ids, ids_at, tokens):
    """Token ids of a sample, 0 beyond them."""
    return tl.load(token_ids + ids_at, mask=ids_at < tokens, other=0)


@triton.jit
def token_logits2(
    q, k_sel, ids, ids_at, rows, key_bias, token_bias, token_bias_k, token_bias_n, tokens, queries, scale,
    HAS_KEY_BIAS: tl.constexpr, HAS_TOKEN_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """log₂e · (scale · q k_selᵀ + key bias + token bias) of chosen keys, [rows, K]; the biases are those of one
    sample.
    """
    s = dot(q, tl.trans(k_sel), UPCAST) * (scale * LOG2E)
    if HAS_KEY_BIAS:
        s += (tl.load(key_bias + ids, mask=ids_at < tokens, other=0.0) * LOG2E)[None, :]
    if HAS_TOKEN_BIAS:
        offsets = ids_at.to(tl.int64)[None, :] * token_bias_k + rows.to(tl.int64)[:, None] * token_bias_n
        inside = (ids_at[None, :] < tokens) & (rows[:, None] < queries)
        s += tl.load(token_bias + offsets, mask=inside, other=0.0) * LOG2E
    return s


@triton.jit
def token_scores2(
    q, k_sel, ids, ids_at, rows, top2, row_frames, key_bias, token_bias, key_frames,
    token_bias_k, token_bias_n, tokens, queries, scale, falloff2, strength,
    HAS_KEY_BIAS: tl.constexpr, HAS_TOKEN_BIAS: tl.constexpr, BAND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits of chosen keys with all that is added, [rows, K], and the band there (without one: the logits again)."""
    s = token_logits2(
        q, k_sel, ids, ids_at, rows, key_bias, token_bias, token_bias_k, token_bias_n, tokens, queries, scale,
        HAS_KEY_BIAS, HAS_TOKEN_BIAS, UPCAST,
    )  # fmt: skip
    band = s
    if BAND:
        band = band_tile(row_frames, tl.load(key_frames + ids), falloff2, strength)
        s += top2[:, None] * band
    return s, band


@triton.jit
def probabilities(s2, lse, MASKED: tl.constexpr):
    """exp(S − lse) from base-2 logits; where rows may be MASKED, 0 in those without keys, whose lse is −∞."""
    p = tl.exp2(s2 - lse[:, None] * LOG2E)
    if MASKED:
        p = tl.where(lse[:, None] == float("-inf"), 0.0, p)
    return p


@triton.jit
def load_frames(frames, indices, length):
    """Frames of a tile of tokens, −1 outside."""
    return tl.load(frames + indices, mask=indices < length, other=-1)


@triton.jit
def band_tile(row_frames, column_frames, falloff2, strength):
    """Strength · 2^(falloff2 · (f_i − f_j)²) of a tile [rows, columns], 0 where a token belongs to no frame."""
    distance = (row_frames[:, None] - column_frames[None, :]).to(tl.float32)
    inside = (row_frames[:, None] >= 0) & (column_frames[None, :] >= 0)
    return tl.where(inside, strength * tl.exp2(falloff2 * distance * distance), 0.0)
