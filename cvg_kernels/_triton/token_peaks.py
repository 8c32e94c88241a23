"""Launchers of Vico's score of tokens: they allocate and launch.

Bytes, in passes over `[B, K, F, h, w]` in float32. Forward: floor 1, here 3 (flow read; shares written, and read).
Backward: floor 1 (zeros written), here 2 and a quarter (marks of a byte cleared; zeros written, and read) and what
lies near peaks.
"""

from __future__ import annotations

import math

import torch
import triton

from cvg_kernels._triton.launch import Launch
from cvg_kernels._triton.token_peaks_kernels import (
    hit_kernel,
    logit_gradient_kernel,
    peak_kernel,
    share_gradient_kernel,
    shares_kernel,
)
from cvg_kernels.ops._token_peaks_call import BLOCK, FRAMES, blocks_shape

_SOFTMAX = {"TOKENS": 16, "VOXELS": 64}  # of a tile


def _arguments(flow: torch.Tensor, sharpness: float, sigma: float) -> dict:
    """What kernels are told besides their tensors."""
    _, tokens, frames, height, width = flow.shape
    return {
        "tokens": tokens, "voxels": frames * height * width, "frames": frames, "height": height, "width": width,
        "sharpness": sharpness, "side": math.exp(-1 / (2 * sigma) ** 2),
    }  # fmt: skip


def _softmax_launch(kernel, flow: torch.Tensor, arguments: dict) -> Launch:
    """All tokens of a sample, and some voxels."""
    grid = (flow.shape[0], triton.cdiv(arguments["voxels"], _SOFTMAX["VOXELS"]))
    return Launch.matching(kernel, grid, arguments, _SOFTMAX, 4, 1)


def _block_launch(kernel, flow: torch.Tensor, arguments: dict) -> Launch:
    """A token of a sample, and a block of places and frames."""
    batch, tokens, *blocks = blocks_shape(flow.shape)
    # Neighbours lie up to a row and a place before a block and behind it.
    near = triton.next_power_of_2(triton.cdiv(2 * (flow.shape[4] + 1), BLOCK) + 2)
    constants = {"BLOCK": BLOCK, "FRAMES": FRAMES, "NEAR": near}
    return Launch.matching(kernel, (batch * tokens, *blocks), arguments, constants, 4, 1)


def forward_launches(flow, sharpness, sigma):
    """The launches of the forward pass; what they fill: maxima of blocks, and sums."""
    sums = flow.new_empty(flow.shape[0], 2, *flow.shape[2:])
    blocks = flow.new_empty(blocks_shape(flow.shape))
    shares = torch.empty_like(flow)
    arguments = _arguments(flow, sharpness, sigma)
    arguments |= {"flow": flow, "shares": shares, "sums": sums, "blocks": blocks}
    launches = [_softmax_launch(shares_kernel, flow, arguments), _block_launch(peak_kernel, flow, arguments)]
    return launches, (blocks, sums)


def hit_launch(flow, sums, blocks, peaks, sharpness, sigma):
    """The launch that finds the places of the peaks; what it fills: marks of them, and their number in each block."""
    hits, counts = torch.zeros_like(flow, dtype=torch.int8), torch.empty_like(blocks)
    arguments = _arguments(flow, sharpness, sigma)
    arguments |= {"flow": flow, "sums": sums, "blocks": blocks, "peaks": peaks, "hits": hits, "counts": counts}
    return _block_launch(hit_kernel, flow, arguments), (hits, counts)


def gradient_launches(weights, flow, sums, hits, counts, sharpness, sigma):
    """The launches that fill the gradient of flow, from that of a token's score at each place of its peak."""
    grad = torch.empty_like(flow)
    arguments = _arguments(flow, sharpness, sigma)
    arguments |= {
        "weights": weights, "flow": flow, "sums": sums, "hits": hits, "counts": counts, "grad_share": grad,
        "grad": grad,
    }  # fmt: skip
    launches = [
        _block_launch(share_gradient_kernel, flow, arguments),
        _softmax_launch(logit_gradient_kernel, flow, arguments),
    ]
    return launches, grad


def forward(flow, sharpness, sigma):
    """Returns the peaks `[B, K]`, the softmax's largest logit and sum below it `[B, 2, F, h, w]`, and maxima of
    blocks.
    """
    launches, (blocks, sums) = forward_launches(flow.contiguous(), sharpness, sigma)
    for launch in launches:
        launch.run()
    return blocks.amax((-2, -1)), sums, blocks


def backward(grad, flow, sums, blocks, sharpness, sigma):
    """The gradient of flow; places that tie for a peak share its gradient."""
    flow, peaks = flow.contiguous(), blocks.amax((-2, -1))
    launch, (hits, counts) = hit_launch(flow, sums, blocks, peaks, sharpness, sigma)
    launch.run()
    weights = grad / counts.sum((-2, -1))
    launches, grad_flow = gradient_launches(weights, flow, sums, hits, counts, sharpness, sigma)
    for launch in launches:
        launch.run()
    return grad_flow
