"""Scores of tokens by the reference, as a backend: its gradient comes from torch, below the operation."""

from __future__ import annotations

import functools

import torch

from cvg_kernels.ops._token_peaks_call import blocks_shape
from cvg_kernels.reference import token_peaks as reference


def forward(flow, sharpness, sigma):
    """Returns the peaks `[B, K]`, the largest logit and the sum below it `[B, 2, F, h, w]`, and room for blocks."""
    logits = sharpness * flow
    most = logits.amax(1)
    sums = torch.stack([most, (logits - most[:, None]).exp().sum(1)], 1)
    peaks = reference.token_peaks(flow, sharpness=sharpness, sigma=sigma).contiguous()
    return peaks, sums, flow.new_zeros(blocks_shape(flow.shape))


def backward(grad, flow, sums, blocks, sharpness, sigma):
    """The gradient of flow."""
    peaks = functools.partial(reference.token_peaks, sharpness=sharpness, sigma=sigma)
    vjp = torch.func.vjp(peaks, flow)[1]
    return vjp(grad)[0].contiguous()
