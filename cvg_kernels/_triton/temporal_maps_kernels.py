"""Kernels of maps between the frames of a video.

At every place of a frame there is one short sequence, that place in each frame, and sequences share tiles as those of
temporal attention do:

    row r  ↔  frame r mod F of place tile · SEQUENCES + r div F

All logits of a row are on chip at once, and the backward pass recomputes P from q and k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cvg_kernels._triton.primitives import LOG2E, dot
from cvg_kernels._triton.temporal_attention_kernels import load_tile, place_rows, softmax, store_tile


@triton.jit
def map_weights(
    q, k, lse, key_bias, b, p, h, frame, inside, together,
    lse_b, lse_p, lse_h, lse_f, key_bias_b, key_bias_p, key_bias_f, scale,
    HAS_LSE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P of a tile of one head, [ROWS, ROWS], 0 where rows are not together."""
    s = dot(q, tl.trans(k), UPCAST) * (scale * LOG2E)
    if HAS_KEY_BIAS:
        offsets = b * key_bias_b + p * key_bias_p + frame.to(tl.int64) * key_bias_f
        s += (tl.load(key_bias + offsets, mask=inside, other=0.0) * LOG2E)[None, :]
    s = tl.where(together, s, float("-inf"))
    if HAS_LSE:
        offsets = b * lse_b + p * lse_p + tl.cast(h, tl.int64) * lse_h + frame.to(tl.int64) * lse_f
        total = tl.load(lse + offsets, mask=inside, other=0.0)[:, None]
        unseen = total == float("-inf")
        return tl.where(unseen, 0.0, tl.exp2(s - tl.where(unseen, 0.0, total) * LOG2E))
    else:
        weights, inverse_total = softmax(s)
        return weights * inverse_total[:, None]


@triton.jit
def maps_place(p, b, h, heads, places, frame, FRAMES: tl.constexpr, HEAD_MEAN: tl.constexpr):
    """Where a tile's maps lie, [ROWS, ROWS]: in `[B, P, F, F]`, or with heads in `[B, H, P, F, F]`."""
    if HEAD_MEAN:
        map_index = b * places + p
    else:
        map_index = (b * heads + h) * places + p
    return (map_index * FRAMES + frame)[:, None] * FRAMES + frame[None, :]


@triton.jit
def maps_forward_kernel(
    query, key, lse, key_bias, maps,
    query_b, query_p, query_h, query_f, query_d, key_b, key_p, key_h, key_f, key_d,
    lse_b, lse_p, lse_h, lse_f, key_bias_b, key_bias_p, key_bias_f,
    places, total, heads, scale,
    FRAMES: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr,
    SEQUENCES: tl.constexpr, QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HEAD_MEAN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maps of a tile of one head; with HEAD_MEAN of all heads, summed in registers and written once."""
    program = tl.program_id(0)
    if HEAD_MEAN:
        tile, first_head, count = program, 0, heads
    else:
        tile, first_head, count = program // heads, program % heads, 1
    sequence, frame, _, b, p, inside = place_rows(tile, places, total, FRAMES, ROWS, SEQUENCES)
    together = (sequence[:, None] == sequence[None, :]) & inside[:, None] & inside[None, :]
    mean = tl.zeros((ROWS, ROWS), tl.float32)
    for h in range(first_head, first_head + count):
        q = load_tile(
            query, b, p, h, frame, inside, query_b, query_p, query_h, query_f, query_d,
            DIM, DIM_PAD, QUERY_UNIT,
        )  # fmt: skip
        k = load_tile(key, b, p, h, frame, inside, key_b, key_p, key_h, key_f, key_d, DIM, DIM_PAD, KEY_UNIT)
        weights = map_weights(
            q, k, lse, key_bias, b, p, h, frame, inside, together,
            lse_b, lse_p, lse_h, lse_f, key_bias_b, key_bias_p, key_bias_f, scale,
            HAS_LSE, HAS_KEY_BIAS, UPCAST,
        )  # fmt: skip
        mean += weights
    map_offsets = maps_place(p, b, first_head, heads, places, frame, FRAMES, HEAD_MEAN)
    tl.store(maps + map_offsets, mean / count, mask=together)


@triton.jit
def maps_backward_kernel(
    query, key, lse, key_bias, grad_maps, grad_query, grad_key, grad_lse,
    query_b, query_p, query_h, query_f, query_d, key_b, key_p, key_h, key_f, key_d,
    lse_b, lse_p, lse_h, lse_f, key_bias_b, key_bias_p, key_bias_f,
    to_query_b, to_query_p, to_query_h, to_query_f, to_key_b, to_key_p, to_key_h, to_key_f,
    to_lse_b, to_lse_p, to_lse_h, to_lse_f,
    places, total, heads, scale,
    FRAMES: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr,
    SEQUENCES: tl.constexpr, QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr,
    TO_QUERY_UNIT: tl.constexpr, TO_KEY_UNIT: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, HEAD_MEAN: tl.constexpr,
    NEED_QUERY: tl.constexpr, NEED_KEY: tl.constexpr, NEED_LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients asked for, as the reference has them, of a tile of one head:
    every number is written by one program.
    """
    tile, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    sequence, frame, _, b, p, inside = place_rows(tile, places, total, FRAMES, ROWS, SEQUENCES)
    together = (sequence[:, None] == sequence[None, :]) & inside[:, None] & inside[None, :]
    q = load_tile(
        query, b, p, h, frame, inside, query_b, query_p, query_h, query_f, query_d,
        DIM, DIM_PAD, QUERY_UNIT,
    )  # fmt: skip
    k = load_tile(key, b, p, h, frame, inside, key_b, key_p, key_h, key_f, key_d, DIM, DIM_PAD, KEY_UNIT)
    weights = map_weights(
        q, k, lse, key_bias, b, p, h, frame, inside, together,
        lse_b, lse_p, lse_h, lse_f, key_bias_b, key_bias_p, key_bias_f, scale,
        HAS_LSE, HAS_KEY_BIAS, UPCAST,
    )  # fmt: skip
    map_offsets = maps_place(p, b, h, heads, places, frame, FRAMES, HEAD_MEAN)
    grads = tl.load(grad_maps + map_offsets, mask=together, other=0.0)  # dP, then scale · dS
    if HEAD_MEAN:
        grads /= heads
    sums = tl.sum(weights * grads, 1)
    if HAS_LSE:
        grads = weights * grads * scale
    else:
        grads = weights * (grads - sums[:, None]) * scale
    if NEED_LSE:
        offsets = b * to_lse_b + p * to_lse_p + tl.cast(h, tl.int64) * to_lse_h
        tl.store(grad_lse + offsets + frame.to(tl.int64) * to_lse_f, -sums, mask=inside)
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
