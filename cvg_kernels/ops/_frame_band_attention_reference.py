"""The reference as a backend: the closed-form gradient stands in where autograd is below the operation."""

from __future__ import annotations

import torch

from cvg_kernels._layout import dense_like, laid_out
from cvg_kernels.ops._autocast import autocast_off
from python_ref import frame_band_attention as reference


def attend(query, key, value, query_frames, key_frames, scale, sigma, strength, row_max_grad):
    """Returns out and lse; see `python_ref.frame_band_attention.frame_band_attention`."""
    with autocast_off(query.device):
        return reference.frame_band_attention(
            query, key, value, query_frames, key_frames,
            scale=scale, sigma=sigma, strength=strength, row_max_grad=row_max_grad,
        )[:2]  # fmt: skip


def forward(query, key, value, query_frames, key_frames, scale, sigma, strength):
    """Returns out, lse, the maximum of each row and its place."""
    with autocast_off(query.device):
        out, lse, highest, place = reference.frame_band_attention(
            query, key, value, query_frames, key_frames, scale=scale, sigma=sigma, strength=strength
        )
    return dense_like(query, value.shape[-1]).copy_(out), lse, highest, place.to(torch.int32)


def backward(
    grad_out, grad_lse, query, key, value, query_frames, key_frames, out, lse, highest, place,
    scale, sigma, strength, row_max_grad, need_query, need_key, need_value,
):  # fmt: skip
    """Returns the gradients asked for; out, lse, maximum and place are computed anew."""
    with autocast_off(query.device):
        grads = reference.frame_band_attention_backward(
            grad_out, grad_lse, query, key, value, query_frames, key_frames,
            scale=scale, sigma=sigma, strength=strength, row_max_grad=row_max_grad,
        )  # fmt: skip
    return laid_out(grads, (query, key, value), (need_query, need_key, need_value))
