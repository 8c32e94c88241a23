"""The forward kernel of attention whose warps have parts of their own: one group fetches keys and values, two compute.

Each tile of keys is masked in the loop where the last one is not whole: with a tile of its own, before or after the
loop, Triton 3.9 fails to compile the specialised loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.attention_forward_parts import finish_head
from cvg_kernels._triton.primitives import LOG2E, dot, offset_of, place_of

#: Elements in which strides are counted: rows of 16 bits begin at multiples of 16 bytes, as descriptors have it.
UNIT = tl.constexpr(8)


@triton.jit
def head_of(tensor, b, h, length, stride_b, stride_h, stride_n, ROWS: tl.constexpr, DIM: tl.constexpr):
    """A descriptor of one head, [length, DIM], that fetches ROWS rows at once, zero beyond the last."""
    base = tensor + offset_of(b, h, stride_b, stride_h, UNIT)
    step = tl.cast(stride_n, tl.int64) * UNIT
    return tl.make_tensor_descriptor(base, [length, DIM], [step, 1], [ROWS, DIM])


@triton.jit
def specialised_kernel(
    query, key, value, out, lse,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_n, out_d,
    heads, queries, keys, factor,
    DIM: tl.constexpr, OUT_UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    TAIL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Out and lse of a tile of rows of one head; the logits are those of a positive factor, without a bias."""
    tile, b, h = place_of(tl.cdiv(queries, ROWS), heads)
    factor2 = factor * LOG2E
    rows = tile * ROWS + tl.arange(0, ROWS)
    q = head_of(query, b, h, queries, query_b, query_h, query_n, ROWS, DIM).load([tile * ROWS, 0])
    k_rows = head_of(key, b, h, keys, key_b, key_h, key_n, COLUMNS, DIM)
    v_rows = head_of(value, b, h, keys, value_b, value_h, value_n, COLUMNS, DIM)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for start in tl.range(0, keys, COLUMNS, num_stages=STAGES, warp_specialize=True):
        k = k_rows.load([start, 0])
        s = dot(q, tl.trans(k), UPCAST)
        if TAIL:
            columns = start + tl.arange(0, COLUMNS)
            s = tl.where(columns[None, :] < keys, s, float("-inf"))
        higher = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s * factor2 - (higher * factor2)[:, None])
        rescale = tl.exp2((m - higher) * factor2)
        l = l * rescale + tl.sum(p, 1)
        v = v_rows.load([start, 0])
        acc = acc * rescale[:, None]
        acc += dot(p.to(v.dtype), v, UPCAST)
        m = higher
    finish_head(
        m * factor2, l, acc, out + offset_of(b, h, out_b, out_h, OUT_UNIT), lse + (b * heads + h) * queries,
        rows, queries, out_n, out_d, DIM, DIM, OUT_UNIT, True,
    )  # fmt: skip
