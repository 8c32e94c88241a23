"""Kernels of temporal attention.

Sequences are short and many. A tile of ROWS rows holds SEQUENCES of them, one after the other, of as many positions;
all products are of whole tiles, and a block-diagonal mask keeps the sequences apart:

    row r  ↔  frame r mod F of position tile · SEQUENCES + r div F

So a row's logits are on chip all at once, and the backward pass recomputes P from q and k alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.primitives import LN2, LOG2E, dot


@triton.jit
def place_rows(tile, positions, total, FRAMES: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr):
    """Sequence, frame, position counted through the batch, its two axes, and whether there is such a row;
    [ROWS] each.
    """
    rows = tl.arange(0, ROWS)
    sequence, frame = rows // FRAMES, rows % FRAMES
    sequence_index = tile.to(tl.int64) * SEQUENCES + sequence
    inside = (sequence < SEQUENCES) & (sequence_index < total)
    return sequence, frame, sequence_index, sequence_index // positions, sequence_index % positions, inside


@triton.jit
def tile_places(
    base, b, p, h, frame, inside, stride_b, stride_p, stride_h, stride_f, stride_d,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where the rows of a tile, [ROWS, DIM_PAD], of one head of a strided [B, P, H, F, DIM] tensor lie, and which do.

    All strides but the last count UNITs of elements.
    """
    dims = tl.arange(0, DIM_PAD)
    rows = b * stride_b + p * stride_p + tl.cast(h, tl.int64) * stride_h
    rows = (rows + frame.to(tl.int64) * stride_f) * UNIT
    return base + rows[:, None] + dims[None, :] * stride_d, inside[:, None] & (dims[None, :] < DIM)


@triton.jit
def load_tile(
    base, b, p, h, frame, inside, stride_b, stride_p, stride_h, stride_f, stride_d,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The rows of a tile; zero outside."""
    places, mask = tile_places(
        base, b, p, h, frame, inside, stride_b, stride_p, stride_h, stride_f, stride_d, DIM, DIM_PAD, UNIT
    )  # fmt: skip
    return tl.load(places, mask=mask, other=0.0)


@triton.jit
def store_tile(
    base, tile, b, p, h, frame, inside, stride_b, stride_p, stride_h, stride_f,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The inverse of load_tile, in the dtype of the tensor, whose last axis is contiguous."""
    places, mask = tile_places(
        base, b, p, h, frame, inside, stride_b, stride_p, stride_h, stride_f, 1, DIM, DIM_PAD, UNIT
    )
    tl.store(places, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def regularised(s, together, added, frame, SCALE_BIAS_BY_ROW_MAX: tl.constexpr, FRAMES: tl.constexpr):
    """S' of a tile and m, both base 2, from S; −∞ where rows are not together."""
    s = tl.where(together, s, float("-inf"))
    m = tl.max(s, 1)
    m = tl.where(m == float("-inf"), 0.0, m)  # of a row that is not there
    a = tl.load(added + frame[:, None] * FRAMES + frame[None, :], mask=together, other=0.0)
    if SCALE_BIAS_BY_ROW_MAX:
        s += m[:, None] * a
    else:
        s += a * LOG2E
    return s, m


@triton.jit
def softmax(s):
    """exp2(S) of a tile, not normalised, and what normalises its rows; a row that sees no key is 0."""
    top = tl.max(s, 1)
    p = tl.exp2(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(p, 1)
    return p, 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def temporal_forward_kernel(
    query, key, value, added, out, maps,
    query_b, query_p, query_h, query_f, query_d, key_b, key_p, key_h, key_f, key_d,
    value_b, value_p, value_h, value_f, value_d, out_b, out_p, out_h, out_f,
    positions, total, heads, scale,
    FRAMES: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr,
    QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    HAS_ADDED: tl.constexpr, SCALE_BIAS_BY_ROW_MAX: tl.constexpr, MAPS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Out of a tile of one head; with MAPS of all heads, whose maps are summed in registers and written once."""
    program = tl.program_id(0)
    if MAPS:
        tile, first_head, count = program, 0, heads
    else:
        tile, first_head, count = program // heads, program % heads, 1
    sequence, frame, sequence_index, b, p, inside = place_rows(tile, positions, total, FRAMES, ROWS, SEQUENCES)
    together = (sequence[:, None] == sequence[None, :]) & inside[:, None] & inside[None, :]
    captured = tl.zeros((ROWS, ROWS), tl.float32)
    for h in range(first_head, first_head + count):
        q = load_tile(
            query, b, p, h, frame, inside, query_b, query_p, query_h, query_f, query_d,
            DIM, DIM_PAD, QUERY_UNIT,
        )  # fmt: skip
        k = load_tile(key, b, p, h, frame, inside, key_b, key_p, key_h, key_f, key_d, DIM, DIM_PAD, KEY_UNIT)
        s = dot(q, tl.trans(k), UPCAST) * (scale * LOG2E)  # [ROWS, ROWS]
        if HAS_ADDED:
            s, _ = regularised(s, together, added, frame, SCALE_BIAS_BY_ROW_MAX, FRAMES)
        else:
            s = tl.where(together, s, float("-inf"))
        weights, inverse_total = softmax(s)
        v = load_tile(
            value, b, p, h, frame, inside, value_b, value_p, value_h, value_f, value_d,
            VALUE_DIM, VALUE_PAD, VALUE_UNIT,
        )  # fmt: skip
        o = dot(weights.to(v.dtype), v, UPCAST) * inverse_total[:, None]
        store_tile(out, o, b, p, h, frame, inside, out_b, out_p, out_h, out_f, VALUE_DIM, VALUE_PAD, OUT_UNIT)
        if MAPS:
            captured += weights * inverse_total[:, None]
    if MAPS:
        map_offsets = (sequence_index * FRAMES + frame)[:, None] * FRAMES + frame[None, :]
        tl.store(maps + map_offsets, captured / heads, mask=together)


@triton.jit
def temporal_backward_kernel(
    query, key, value, added, grad_out, grad_maps, grad_query, grad_key, grad_value, sums,
    query_b, query_p, query_h, query_f, query_d, key_b, key_p, key_h, key_f, key_d,
    value_b, value_p, value_h, value_f, value_d, grad_b, grad_p, grad_h, grad_f, grad_d,
    to_query_b, to_query_p, to_query_h, to_query_f, to_key_b, to_key_p, to_key_h, to_key_f,
    to_value_b, to_value_p, to_value_h, to_value_f,
    positions, total, heads, tiles, scale,
    FRAMES: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr,
    QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, GRAD_UNIT: tl.constexpr,
    TO_QUERY_UNIT: tl.constexpr, TO_KEY_UNIT: tl.constexpr, TO_VALUE_UNIT: tl.constexpr,
    HAS_ADDED: tl.constexpr, SCALE_BIAS_BY_ROW_MAX: tl.constexpr, ROW_MAX_GRAD: tl.constexpr,
    HAS_OUT: tl.constexpr, MAPS: tl.constexpr, NEED_QUERY: tl.constexpr, NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr, NEED_ADDED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients asked for, as the reference has them.

    A program takes one tile of one head. Where the gradient of `added` is wanted it takes every n-th, sums the terms
    in registers and writes a tile [ROWS, ROWS] of its own: no atomics.
    """
    program = tl.program_id(0)
    end = tiles * heads if NEED_ADDED else program + 1
    step = tl.num_programs(0) if NEED_ADDED else 1
    added_sum = tl.zeros((ROWS, ROWS), tl.float32)
    columns = tl.arange(0, ROWS)
    for work in range(program, end, step):
        tile, h = work // heads, work % heads
        sequence, frame, sequence_index, b, p, inside = place_rows(tile, positions, total, FRAMES, ROWS, SEQUENCES)
        together = (sequence[:, None] == sequence[None, :]) & inside[:, None] & inside[None, :]
        q = load_tile(
            query, b, p, h, frame, inside, query_b, query_p, query_h, query_f, query_d,
            DIM, DIM_PAD, QUERY_UNIT,
        )  # fmt: skip
        k = load_tile(key, b, p, h, frame, inside, key_b, key_p, key_h, key_f, key_d, DIM, DIM_PAD, KEY_UNIT)
        s = tl.where(together, dot(q, tl.trans(k), UPCAST) * (scale * LOG2E), float("-inf"))
        first = columns[:, None]
        if SCALE_BIAS_BY_ROW_MAX and ROW_MAX_GRAD:  # the first key that reaches the maximum
            reaches = s == tl.max(s, 1)[:, None]
            first = tl.min(tl.where(reaches, columns[None, :], ROWS), 1)[:, None]
        m = tl.zeros((ROWS,), tl.float32)
        if HAS_ADDED:
            s, m = regularised(s, together, added, frame, SCALE_BIAS_BY_ROW_MAX, FRAMES)
        weights, inverse_total = softmax(s)
        weights *= inverse_total[:, None]

        grads = tl.zeros((ROWS, ROWS), tl.float32)  # dP, then dS', then scale · dS
        if HAS_OUT:
            v = load_tile(
                value, b, p, h, frame, inside, value_b, value_p, value_h, value_f, value_d,
                VALUE_DIM, VALUE_PAD, VALUE_UNIT,
            )  # fmt: skip
            do = load_tile(
                grad_out, b, p, h, frame, inside, grad_b, grad_p, grad_h, grad_f, grad_d,
                VALUE_DIM, VALUE_PAD, GRAD_UNIT,
            )  # fmt: skip
            grads = dot(do, tl.trans(v), UPCAST)
            if NEED_VALUE:
                dv = dot(tl.trans(weights.to(do.dtype)), do, UPCAST)
                store_tile(
                    grad_value, dv, b, p, h, frame, inside,
                    to_value_b, to_value_p, to_value_h, to_value_f, VALUE_DIM, VALUE_PAD, TO_VALUE_UNIT,
                )  # fmt: skip
        if MAPS:
            map_offsets = (sequence_index * FRAMES + frame)[:, None] * FRAMES + frame[None, :]
            grads += tl.load(grad_maps + map_offsets, mask=together, other=0.0) / heads
        grads = weights * (grads - tl.sum(weights * grads, 1)[:, None])
        if NEED_ADDED:
            added_sum += grads * (m * LN2)[:, None] if SCALE_BIAS_BY_ROW_MAX else grads
        if SCALE_BIAS_BY_ROW_MAX and ROW_MAX_GRAD:
            a = tl.load(added + frame[:, None] * FRAMES + frame[None, :], mask=together, other=0.0)
            through_max = tl.sum(a * grads, 1)[:, None]
            grads += tl.where(columns[None, :] == first, through_max, 0.0)
        grads *= scale
        if NEED_QUERY:
            dq = dot(grads.to(k.dtype), k, UPCAST)
            store_tile(
                grad_query, dq, b, p, h, frame, inside,
                to_query_b, to_query_p, to_query_h, to_query_f, DIM, DIM_PAD, TO_QUERY_UNIT,
            )  # fmt: skip
        if NEED_KEY:
            dk = dot(tl.trans(grads.to(q.dtype)), q, UPCAST)
            store_tile(
                grad_key, dk, b, p, h, frame, inside,
                to_key_b, to_key_p, to_key_h, to_key_f, DIM, DIM_PAD, TO_KEY_UNIT,
            )  # fmt: skip
    if NEED_ADDED:
        mine = program * ROWS * ROWS
        tl.store(sums + mine + columns[:, None] * ROWS + columns[None, :], added_sum)
