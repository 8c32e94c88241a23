"""Kernels of Vico's score of tokens: A_k = max (G ∗ softmax_K(sharpness · flow))_k.

The softmax is held as the flow of the largest logit and the sum of exponentials below it, two numbers a voxel (their
one logarithm would cost digits). Flows are subtracted, not logits: of huge ones a fused sharpness · flow − logit is no
longer 0 at the largest, and the exponential ends. G is the product of three-tap filters (side, 1, side) / (1 + 2 side)
along frames, rows and columns, reflected at the ends. A voxel's smoothed share reads 27 neighbours; a program walks
through FRAMES frames of a block of places and keeps three smoothed planes, so that it loads 9 of them a frame.

Backward, a score hangs on the 27 voxels around its peak alone. Blocks that do not hold a peak are known by their
maxima from the forward pass; the gradient of shares is gathered near peaks only, and that of flow written where any
token has one: elsewhere the passes cost one zero written and read for each number.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def reflected(index, size):
    """An index one step beyond an end comes back by one; a single one stays."""
    index = tl.where(index < 0, 1, tl.where(index == size, size - 2, index))
    return tl.where(size == 1, 0, index)


@triton.jit
def blur_tap_vjp(index, step, size, side):
    """What an index gets back from its neighbour `step` away: the transpose of the reflected filter's tap."""
    twice = ((step < 0) & (index == 1)) | ((step > 0) & (index == size - 2))
    tap = tl.where(twice, 2 * side, side)
    tap = tl.where((index + step < 0) | (index + step >= size), 0.0, tap)
    here = tl.where(size == 1, 1 + 2 * side, 1.0)
    return tl.where(step == 0, here, tap)


@triton.jit
def share_of(flow, most, total, sharpness):
    """Softmax of a logit, from the flow of the largest of its voxel and the sum below."""
    return tl.exp(sharpness * (flow - most)) / total


@triton.jit
def shares_kernel(flow, shares, sums, tokens, voxels, sharpness, TOKENS: tl.constexpr, VOXELS: tl.constexpr):
    """Softmax over the tokens of a block of voxels; `sums` gets the flow of the largest logit and the sum below it."""
    b = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * VOXELS + tl.arange(0, VOXELS)
    sign = tl.where(sharpness < 0, -1.0, 1.0)
    most = tl.full([VOXELS], float("-inf"), tl.float32)
    total = tl.zeros([VOXELS], tl.float32)
    for first in range(0, tokens, TOKENS):
        k = first + tl.arange(0, TOKENS)
        inside = (k[:, None] < tokens) & (v[None, :] < voxels)
        offsets = (b * tokens + k[:, None]) * voxels + v[None, :]
        x = sign * tl.load(flow + offsets, mask=inside, other=0.0)
        above = tl.maximum(most, tl.max(tl.where(inside, x, float("-inf")), 0))
        base = tl.where(above == float("-inf"), 0.0, above)
        below = tl.where(inside, tl.exp(sign * sharpness * (x - base[None, :])), 0.0)
        total = tl.where(first == 0, 0.0, total * tl.exp(sign * sharpness * (most - base))) + tl.sum(below, 0)
        most = above
    most *= sign
    tl.store(sums + 2 * b * voxels + v, most, mask=v < voxels)
    tl.store(sums + (2 * b + 1) * voxels + v, total, mask=v < voxels)
    for first in range(0, tokens, TOKENS):
        k = first + tl.arange(0, TOKENS)
        inside = (k[:, None] < tokens) & (v[None, :] < voxels)
        offsets = (b * tokens + k[:, None]) * voxels + v[None, :]
        x = tl.load(flow + offsets, mask=inside, other=0.0)
        tl.store(shares + offsets, share_of(x, most[None, :], total[None, :], sharpness), mask=inside)


@triton.jit
def load_share(source, most, offsets, voxels, sharpness, inside, MADE: tl.constexpr):
    """A share, as it is MADE in `source`, or from the flow there."""
    number = tl.load(source + offsets, mask=inside, other=0.0)
    if MADE:
        return number
    top = tl.load(most + offsets, mask=inside, other=0.0)
    return share_of(number, top, tl.load(most + voxels + offsets, mask=inside, other=1.0), sharpness)


@triton.jit
def smooth_row(source, most, row, before, x, after, voxels, sharpness, side, inside, MADE: tl.constexpr):
    """Three taps along a row."""
    ends = load_share(source, most, row + before, voxels, sharpness, inside, MADE)
    ends += load_share(source, most, row + after, voxels, sharpness, inside, MADE)
    return load_share(source, most, row + x, voxels, sharpness, inside, MADE) + side * ends


@triton.jit
def smooth_plane(source, most, frame, height, width, voxels, sharpness, side, v, inside, MADE: tl.constexpr):
    """Nine taps in a frame, not normalised."""
    plane = frame * height * width
    y, x = v // width, v % width
    left, right = reflected(x - 1, width), reflected(x + 1, width)
    above = plane + reflected(y - 1, height) * width
    below = plane + reflected(y + 1, height) * width
    rows = smooth_row(source, most, above, left, x, right, voxels, sharpness, side, inside, MADE)
    rows += smooth_row(source, most, below, left, x, right, voxels, sharpness, side, inside, MADE)
    row = plane + y * width
    return smooth_row(source, most, row, left, x, right, voxels, sharpness, side, inside, MADE) + side * rows


@triton.jit
def block_peak(
    source, most, hits, top, frames, height, width, sharpness, side,
    BLOCK: tl.constexpr, FRAMES: tl.constexpr, MADE: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """The largest smoothed share of a program's block;
    with MARK how many reach `top`, which are set to 1 in `hits`.
    """
    voxels = frames * height * width
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < height * width
    first = tl.program_id(2) * FRAMES
    norm = 1 + 2 * side
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    reached = tl.zeros([BLOCK], tl.float32)
    before = smooth_plane(
        source, most, reflected(first - 1, frames), height, width, voxels, sharpness, side, v, inside, MADE
    )  # fmt: skip
    here = smooth_plane(source, most, first, height, width, voxels, sharpness, side, v, inside, MADE)
    for f in range(first, tl.minimum(first + FRAMES, frames)):
        after = smooth_plane(
            source, most, reflected(f + 1, frames), height, width, voxels, sharpness, side, v, inside, MADE
        )  # fmt: skip
        smooth = (here + side * (before + after)) / (norm * norm * norm)
        if MARK:
            hit = tl.where(inside, tl.where(smooth < top, 0, 1), 0)  # all of them where `top` is NaN
            tl.store(hits + f * height * width + v, hit.to(tl.int8), mask=hit > 0)
            reached += hit.to(tl.float32)
        else:
            largest = tl.maximum(largest, smooth, propagate_nan=_NAN)
        before = here
        here = after
    if MARK:
        return tl.sum(reached)
    odd = tl.sum(tl.where(inside & (largest != largest), largest, 0.0))  # a NaN is the maximum
    return tl.max(tl.where(inside, largest, float("-inf"))) + odd


@triton.jit
def block_of_program():
    """The token of a program, counted through the samples, and the number of its block among all."""
    token = tl.program_id(0).to(tl.int64)
    return token, (token * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)


@triton.jit
def peak_kernel(shares, blocks, frames, height, width, side, BLOCK: tl.constexpr, FRAMES: tl.constexpr):
    """The largest smoothed share of a token in a block: BLOCK places of FRAMES frames."""
    token, block = block_of_program()
    shares += token * frames * height * width
    peak = block_peak(shares, shares, shares, 0.0, frames, height, width, 1.0, side, BLOCK, FRAMES, True, False)
    tl.store(blocks + block, peak)


@triton.jit
def hit_kernel(
    flow, sums, blocks, peaks, hits, counts, tokens, frames, height, width, sharpness, side,
    BLOCK: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """Marks the places where a token has its peak, and counts them in each block: NaN where the peak is."""
    token, block = block_of_program()
    peak = tl.load(peaks + token)
    if tl.load(blocks + block) < peak:
        tl.store(counts + block, 0.0)
    else:
        voxels = frames * height * width
        flow += token * voxels
        hits += token * voxels
        most = sums + 2 * (token // tokens) * voxels
        # Of the numbers as this kernel makes them: another one may round otherwise.
        top = block_peak(
            flow, most, hits, 0.0, frames, height, width, sharpness, side, BLOCK, FRAMES, False, False
        )  # fmt: skip
        count = block_peak(
            flow, most, hits, top + (peak - peak), frames, height, width, sharpness, side, BLOCK, FRAMES, False, True
        )  # fmt: skip
        tl.store(counts + block, count + (peak - peak))


@triton.jit
def share_gradient_kernel(
    hits, counts, weights, grad_share, frames, height, width, side,
    BLOCK: tl.constexpr, FRAMES: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """The gradient of a token's shares on a block, Gᵀ of its `weights` at the peaks: zeros unless a peak is near."""
    token, _ = block_of_program()
    voxels, plane = frames * height * width, height * width
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(2) * FRAMES
    hits += token * voxels
    grad_share += token * voxels

    # The blocks that a neighbour of a voxel of this one may lie in.
    lowest = tl.maximum(tl.program_id(1) * BLOCK - width - 1, 0) // BLOCK
    across = lowest + tl.arange(0, NEAR)[:, None]
    along = tl.program_id(2) - 1 + tl.arange(0, 4)[None, :]
    inside_grid = (across * BLOCK < (tl.program_id(1) + 1) * BLOCK + width + 1) & (across < tl.num_programs(1))
    inside_grid &= (along >= 0) & (along < tl.program_id(2) + 2) & (along < tl.num_programs(2))
    blocks = (token * tl.num_programs(1) + across) * tl.num_programs(2) + along
    near = tl.max(tl.where(tl.load(counts + blocks, mask=inside_grid, other=0.0) != 0, 1, 0)) > 0

    y, x = v // width, v % width
    norm = 1 + 2 * side
    weight = tl.load(weights + token) / (norm * norm * norm)
    for f in range(first, tl.minimum(first + FRAMES, frames)):
        total = tl.zeros([BLOCK], tl.float32)
        if near:
            for neighbour in range(27):
                df, dy, dx = neighbour // 9 - 1, neighbour // 3 % 3 - 1, neighbour % 3 - 1
                tap = blur_tap_vjp(f, df, frames, side) * blur_tap_vjp(y, dy, height, side)
                tap *= blur_tap_vjp(x, dx, width, side)
                offsets = (f + df) * plane + (y + dy) * width + x + dx
                hit = tl.load(hits + offsets, mask=(v < plane) & (tap != 0), other=0)
                total += tl.where(hit != 0, tap, 0.0)
            total = tl.where(total != 0, total * weight, 0.0)
        tl.store(grad_share + f * plane + v, total, mask=v < plane)


@triton.jit
def logit_gradient_kernel(flow, sums, grad, tokens, voxels, sharpness, TOKENS: tl.constexpr, VOXELS: tl.constexpr):
    """Turns the gradient of shares in `grad` to that of flow:  sharpness · share_k (dshare_k − Σ_j dshare_j share_j).

    Where no token has one, it is left as it is, zero.
    """
    b = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * VOXELS + tl.arange(0, VOXELS)
    most = tl.load(sums + 2 * b * voxels + v, mask=v < voxels, other=0.0)[None, :]
    total = tl.load(sums + (2 * b + 1) * voxels + v, mask=v < voxels, other=1.0)[None, :]
    mean = tl.zeros([VOXELS], tl.float32)
    lit = tl.zeros([VOXELS], tl.int32)
    for first in range(0, tokens, TOKENS):
        k = first + tl.arange(0, TOKENS)
        inside = (k[:, None] < tokens) & (v[None, :] < voxels)
        offsets = (b * tokens + k[:, None]) * voxels + v[None, :]
        d = tl.load(grad + offsets, mask=inside, other=0.0)
        share = share_of(tl.load(flow + offsets, mask=d != 0, other=0.0), most, total, sharpness)
        mean += tl.sum(tl.where(d != 0, d * share, 0.0), 0)
        lit = tl.maximum(lit, tl.max(tl.where(d != 0, 1, 0), 0))
    if tl.max(lit) > 0:
        for first in range(0, tokens, TOKENS):
            k = first + tl.arange(0, TOKENS)
            inside = (k[:, None] < tokens) & (lit[None, :] > 0)
            offsets = (b * tokens + k[:, None]) * voxels + v[None, :]
            d = tl.load(grad + offsets, mask=inside, other=0.0)
            share = share_of(tl.load(flow + offsets, mask=inside, other=0.0), most, total, sharpness)
            tl.store(grad + offsets, sharpness * share * (d - mean[None, :]), mask=inside)
