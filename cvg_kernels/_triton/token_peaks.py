"""Vico's score of tokens in Triton: A_k = max (G ∗ softmax_K(sharpness · flow))_k.

The softmax is never held: the largest logit and the sum of exponentials below it are, two numbers a voxel (their one
logarithm would cost digits), and a token's shares are made anew where its smoothing reads them. G is the product of
three-tap filters (side, 1, side) / (1 + 2 side) along frames, rows and columns, reflected at the ends, so that a voxel
reads 27 neighbours.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from cvg_kernels._triton.launch import Launch

_BLOCK = 256  # voxels of a program


@triton.jit
def reflected(at, size):
    """An index one step beyond an end comes back by one; a single one stays."""
    at = tl.where(at < 0, 1, tl.where(at == size, size - 2, at))
    return tl.where(size == 1, 0, at)


@triton.jit
def pulled_tap(at, step, size, side):
    """What an index gets back from its neighbour `step` away: the transpose of the reflected filter's tap."""
    twice = ((step < 0) & (at == 1)) | ((step > 0) & (at == size - 2))
    tap = tl.where(twice, 2 * side, side)
    tap = tl.where((at + step < 0) | (at + step >= size), 0.0, tap)
    here = tl.where(size == 1, 1 + 2 * side, 1.0)
    return tl.where(step == 0, here, tap)


@triton.jit
def load_share(flow, most, voxels, sharpness, inside):
    """softmax_K(sharpness · flow) of one token; `most` points at the largest logit, the sum stands `voxels` behind."""
    logit = sharpness * tl.load(flow, mask=inside, other=0.0)
    below = tl.exp(logit - tl.load(most, mask=inside, other=0.0))
    return below / tl.load(most + voxels, mask=inside, other=1.0)


@triton.jit
def denominator_kernel(flow, sums, tokens, voxels, sharpness, BLOCK: tl.constexpr):
    """Lse = log Σ_k e^(sharpness · flow_k) of a block of voxels."""
    b = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(tokens):
        x = sharpness * tl.load(flow + (b * tokens + k) * voxels + v, mask=v < voxels, other=0.0)
        above = tl.maximum(most, x)
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(most - base) + tl.exp(x - base)
        most = above
    tl.store(sums + 2 * b * voxels + v, most, mask=v < voxels)
    tl.store(sums + (2 * b + 1) * voxels + v, total, mask=v < voxels)


@triton.jit
def smooth_kernel(
    flow, sums, smooth, peaks, tokens, frames, height, width, sharpness, side,
    PEAKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Smoothed shares of a token on a block of voxels: their maximum if PEAKS, else all of them."""
    token = tl.program_id(0).to(tl.int64)
    voxels = frames * height * width
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < voxels
    f, y, x = v // (height * width), v // width % height, v % width
    flow += token * voxels
    most = sums + 2 * (token // tokens) * voxels
    total = tl.zeros([BLOCK], tl.float32)
    for neighbour in range(27):
        df, dy, dx = neighbour // 9 - 1, neighbour // 3 % 3 - 1, neighbour % 3 - 1
        at = reflected(f + df, frames) * height + reflected(y + dy, height)
        at = at * width + reflected(x + dx, width)
        share = load_share(flow + at, most + at, voxels, sharpness, inside)
        total += (
            share
            * tl.where(df == 0, 1.0, side)
            * tl.where(dy == 0, 1.0, side)
            * tl.where(dx == 0, 1.0, side)
        )
    norm = 1 + 2 * side
    total = total / (norm * norm * norm)
    if PEAKS:
        odd = tl.sum(tl.where(inside & (total != total), total, 0.0))  # a NaN is the maximum
        most = tl.max(tl.where(inside, total, float("-inf")))
        tl.store(peaks + token * tl.num_programs(1) + tl.program_id(1), most + odd)
    else:
        tl.store(smooth + token * voxels + v, total, mask=inside)


@triton.jit
def pull_kernel(
    flow,
    sums,
    weight,
    grad_flow,
    tokens,
    frames,
    height,
    width,
    sharpness,
    side,
    BLOCK: tl.constexpr,
):
    """The gradient of flow on a block of voxels, from that of the smoothed shares (`weight`).

    dshare = Gᵀ weight;  dflow_k = sharpness · share_k (dshare_k − Σ_j dshare_j share_j).
    """
    b = tl.program_id(0).to(tl.int64)
    voxels = frames * height * width
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < voxels
    f, y, x = v // (height * width), v // width % height, v % width
    norm = 1 + 2 * side
    most = sums + 2 * b * voxels + v
    mean = tl.zeros([BLOCK], tl.float32)
    for k in range(tokens):
        row = (b * tokens + k) * voxels
        grad_share = tl.zeros([BLOCK], tl.float32)
        for neighbour in range(27):
            df, dy, dx = neighbour // 9 - 1, neighbour // 3 % 3 - 1, neighbour % 3 - 1
            tap = pulled_tap(f, df, frames, side) * pulled_tap(y, dy, height, side)
            tap *= pulled_tap(x, dx, width, side)
            at = ((f + df) * height + y + dy) * width + x + dx
            grad_share += tap * tl.load(weight + row + at, mask=inside & (tap != 0), other=0.0)
        grad_share /= norm * norm * norm
        mean += grad_share * load_share(flow + row + v, most, voxels, sharpness, inside)
        tl.store(grad_flow + row + v, grad_share, mask=inside)
    for k in range(tokens):
        row = (b * tokens + k) * voxels
        grad_share = tl.load(grad_flow + row + v, mask=inside, other=0.0)
        share = load_share(flow + row + v, most, voxels, sharpness, inside)
        tl.store(grad_flow + row + v, sharpness * share * (grad_share - mean), mask=inside)


def _launch(kernel, programs: int, flow: torch.Tensor, arguments: dict, **constants) -> Launch:
    frames, height, width = flow.shape[2:]
    voxels = frames * height * width
    sizes = {"tokens": flow.shape[1], "voxels": voxels, "frames": frames, "height": height, "width": width}  # fmt: skip
    names = set(kernel.arg_names)
    arguments = {name: value for name, value in (sizes | arguments).items() if name in names}
    grid = (programs, triton.cdiv(voxels, _BLOCK))
    return Launch(
        kernel, grid, arguments, {"BLOCK": _BLOCK, **constants}, num_warps=4, num_stages=2
    )


def _common(flow, sums, sharpness, sigma) -> dict:
    side = math.exp(-1 / (2 * sigma) ** 2)
    return {"flow": flow, "sums": sums, "sharpness": sharpness, "side": side, "smooth": None, "peaks": None}  # fmt: skip


def forward_launches(flow, sharpness, sigma):
    """The launches of the forward pass; what they fill: peaks of blocks `[B, K, blocks]`, and sums."""
    batch, tokens = flow.shape[:2]
    sums = flow.new_empty(batch, 2, *flow.shape[2:])
    blocks = flow.new_empty(batch, tokens, triton.cdiv(sums[0, 0].numel(), _BLOCK))
    arguments = _common(flow, sums, sharpness, sigma)
    return [
        _launch(denominator_kernel, batch, flow, {k: arguments[k] for k in ("flow", "sums", "sharpness")}),
        _launch(smooth_kernel, batch * tokens, flow, arguments | {"peaks": blocks}, PEAKS=True),
    ], (blocks, sums)  # fmt: skip


def smooth_launch(flow, sums, sharpness, sigma, smooth):
    """The launch that fills `smooth` with the smoothed shares."""
    arguments = _common(flow, sums, sharpness, sigma) | {"smooth": smooth}
    programs = flow.shape[0] * flow.shape[1]
    return _launch(smooth_kernel, programs, flow, arguments, PEAKS=False)


def pull_launch(flow, sums, weight, sharpness, sigma, grad_flow):
    """The launch that fills `grad_flow` from the gradient of the smoothed shares."""
    arguments = _common(flow, sums, sharpness, sigma) | {"weight": weight, "grad_flow": grad_flow}
    return _launch(pull_kernel, flow.shape[0], flow, arguments)


def forward(flow, sharpness, sigma):
    """Returns the peaks `[B, K]` and the largest logit and the softmax's denominator below it `[B, 2, F, h, w]`."""
    launches, (blocks, sums) = forward_launches(flow.contiguous(), sharpness, sigma)
    for launch in launches:
        launch.run()
    return blocks.amax(-1), sums


def backward(grad, flow, sums, sharpness, sigma):
    """The gradient of flow. The smoothed shares are made once more, and compared among themselves to find the peaks."""
    flow = flow.contiguous()
    smooth = torch.empty_like(flow)
    smooth_launch(flow, sums, sharpness, sigma, smooth).run()
    hit = smooth == smooth.amax((2, 3, 4), keepdim=True)
    weight = hit * (grad[:, :, None, None, None] / hit.sum((2, 3, 4), keepdim=True))
    grad_flow = smooth  # its numbers are no longer needed
    pull_launch(flow, sums, weight, sharpness, sigma, grad_flow).run()
    return grad_flow
