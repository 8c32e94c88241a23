"""Small pieces that the attention kernels share."""

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
def load_rows(base, rows, length, row_stride, dim_stride, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Rows of a strided [length, DIM] matrix as a tile [rows, DIM_PAD], zero outside."""
    dims = tl.arange(0, DIM_PAD)
    at = rows.to(tl.int64)[:, None] * row_stride + dims[None, :] * dim_stride
    inside = (rows[:, None] < length) & (dims[None, :] < DIM)
    return tl.load(base + at, mask=inside, other=0.0)


@triton.jit
def store_rows(base, tile, rows, length, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """A tile [rows, DIM_PAD] into a contiguous [length, DIM] matrix, in its dtype."""
    dims = tl.arange(0, DIM_PAD)
    at = rows.to(tl.int64)[:, None] * DIM + dims[None, :]
    inside = (rows[:, None] < length) & (dims[None, :] < DIM)
    tl.store(base + at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def logits2(q, k, columns, bias, keys, scale, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr):
    """log₂e · (scale · q kᵀ + bias) of a tile [rows, columns]; −∞ beyond the keys."""
    s = dot(q, tl.trans(k), UPCAST) * (scale * LOG2E)
    if HAS_BIAS:
        s += tl.load(bias + columns, mask=columns < keys, other=0.0)[None, :] * LOG2E
    return tl.where(columns[None, :] < keys, s, float("-inf"))


@triton.jit
def captured_logits2(
    q, key, key_n, key_d, ids, wanted, bias, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """log₂e · (scale · q k_selᵀ + bias) of the captured keys, a tile [rows, K]: a gather of K rows and one product."""
    dims = tl.arange(0, DIM_PAD)
    at = ids[:, None] * key_n + dims[None, :] * key_d
    k = tl.load(key + at, mask=wanted[:, None] & (dims[None, :] < DIM), other=0.0)
    s = dot(q, tl.trans(k), UPCAST) * (scale * LOG2E)
    if HAS_BIAS:
        s += tl.load(bias + ids, mask=wanted, other=0.0)[None, :] * LOG2E
    return s


@triton.jit
def probabilities(s2, lse):
    """exp(S − lse) from base-2 logits; 0 in a row without keys, whose lse is −∞."""
    p = tl.exp2(s2 - lse[:, None] * LOG2E)
    return tl.where(lse[:, None] == float("-inf"), 0.0, p)
