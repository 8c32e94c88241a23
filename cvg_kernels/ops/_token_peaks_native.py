"""Scores of tokens by the C++ kernels: allocates the results and passes addresses."""

from __future__ import annotations

import math

import torch

from cvg_kernels import native
from cvg_kernels.ops._native_call import DTYPE_CODES, threads
from cvg_kernels.ops._token_peaks_call import blocks_shape


def _call(flow, sharpness, sigma) -> tuple:
    side = math.exp(-1 / (2 * sigma) ** 2)
    return (tuple(flow.shape), DTYPE_CODES[flow.dtype], flow.data_ptr(), sharpness, side, threads())


def forward(flow, sharpness, sigma):
    """Returns the peaks `[B, K]`, the softmax's largest logit and sum below it `[B, 2, F, h, w]`,
    and room for blocks.
    """
    flow = flow.contiguous()
    peaks = flow.new_empty(flow.shape[:2])
    sums = flow.new_empty(flow.shape[0], 2, *flow.shape[2:])
    native.load("cpu").token_peaks(*_call(flow, sharpness, sigma), peaks.data_ptr(), sums.data_ptr())
    return peaks, sums, flow.new_zeros(blocks_shape(flow.shape))


def backward(grad, flow, sums, blocks, sharpness, sigma):
    """The gradient of flow."""
    flow, grad = flow.contiguous(), grad.contiguous()
    grad_flow = torch.empty_like(flow)
    native.load("cpu").token_peaks_backward(
        *_call(flow, sharpness, sigma), grad.data_ptr(), sums.data_ptr(), grad_flow.data_ptr()
    )
    return grad_flow
