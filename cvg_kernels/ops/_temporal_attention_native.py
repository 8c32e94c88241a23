"""Temporal attention by the C++ kernels: allocates the results and passes addresses."""

from __future__ import annotations

from functools import partial

import torch

from cvg_kernels import native
from cvg_kernels.ops._layout import dense_like
from cvg_kernels.ops._native_call import DTYPE_CODES, address, strided

_strided = partial(strided, rank=5)


def _call(query, key, value, added, scale, by_row_max) -> tuple:
    """The arguments that both passes begin with."""
    return (
        (*query.shape, value.shape[-1]), DTYPE_CODES[query.dtype], _strided(query), _strided(key), _strided(value),
        address(added), scale, by_row_max, torch.get_num_threads(),
    )  # fmt: skip


def forward(query, key, value, added, scale, by_row_max, capture):
    """Returns out and maps (`None` without capture); see `python_ref.temporal_attention`."""
    batch, positions, _, frames, _ = query.shape
    out, maps = dense_like(query, value.shape[-1]), None
    if capture:
        wide = torch.promote_types(query.dtype, torch.float32)
        maps = query.new_empty((batch, positions, frames, frames), dtype=wide)
    native.load("cpu").temporal_attention_forward(
        *_call(query, key, value, added, scale, by_row_max), _strided(out), address(maps)
    )
    return out, maps


def backward(
    grad_out, grad_maps, query, key, value, added, scale, by_row_max, row_max_grad,
    need_query, need_key, need_value, need_added,
):  # fmt: skip
    """Returns the gradients asked for; see `python_ref.temporal_attention`."""
    grad_maps = None if grad_maps is None else grad_maps.contiguous()
    needed = (need_query, need_key, need_value)
    grads = [
        dense_like(tensor) if need else None
        for tensor, need in zip((query, key, value), needed, strict=True)
    ]
    grad_added = torch.empty_like(added) if need_added else None
    native.load("cpu").temporal_attention_backward(
        *_call(query, key, value, added, scale, by_row_max),
        _strided(grad_out), address(grad_maps), row_max_grad,
        *(_strided(grad) for grad in grads), address(grad_added),
    )  # fmt: skip
    return (*grads, grad_added)
