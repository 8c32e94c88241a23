"""Attention with a band by frame distance by the C++ kernels: allocates the results and passes addresses."""

from __future__ import annotations

import torch

from cvg_kernels import native
from cvg_kernels._layout import dense_like
from cvg_kernels.ops._native_call import DTYPE_CODES, address, strided


def _call(query, key, value, query_frames, key_frames, scale, sigma, strength) -> tuple:
    """The arguments that both passes begin with."""
    sizes = (*query.shape[:3], key.shape[2], query.shape[3], value.shape[3])
    return (
        sizes, DTYPE_CODES[query.dtype], strided(query), strided(key), strided(value),
        address(query_frames), address(key_frames), scale, sigma, strength, torch.get_num_threads(),
    )  # fmt: skip


def forward(query, key, value, query_frames, key_frames, scale, sigma, strength):
    """Returns out, lse, the maximum of each row and its place; see `python_ref.frame_band_attention`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out = dense_like(query, value.shape[3])
    lse, highest = (query.new_empty(query.shape[:3], dtype=wide) for _ in range(2))
    place = query.new_empty(query.shape[:3], dtype=torch.int32)
    native.load("cpu").frame_band_attention_forward(
        *_call(query, key, value, query_frames, key_frames, scale, sigma, strength),
        strided(out), address(lse), address(highest), address(place),
    )  # fmt: skip
    return out, lse, highest, place


def backward(
    grad_out, grad_lse, query, key, value, query_frames, key_frames, out, lse, highest, place,
    scale, sigma, strength, row_max_grad, need_query, need_key, need_value,
):  # fmt: skip
    """Returns the gradients asked for; see `python_ref.frame_band_attention`."""
    needed, tensors = (need_query, need_key, need_value), (query, key, value)
    grads = tuple(
        dense_like(tensor) if need else None for tensor, need in zip(tensors, needed, strict=True)
    )
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    native.load("cpu").frame_band_attention_backward(
        *_call(query, key, value, query_frames, key_frames, scale, sigma, strength),
        strided(grad_out), address(grad_lse), strided(out), address(lse), address(highest),
        address(place), row_max_grad, *(strided(grad) for grad in grads),
    )  # fmt: skip
    return grads
