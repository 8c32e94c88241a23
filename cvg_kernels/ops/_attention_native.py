"""Attention with capture by the C++ kernels: allocates the results and passes addresses."""

from __future__ import annotations

import torch

from cvg_kernels import native
from cvg_kernels.ops._native_call import DTYPE_CODES, address, strided


def _call(query, key, value, token_ids, bias, scale, head_mean) -> tuple:
    """The arguments that both passes begin with."""
    batch, heads, queries, dim = query.shape
    value_dim = 0 if value is None else value.shape[3]
    sizes = (batch, heads, queries, key.shape[2], dim, value_dim, token_ids.shape[1])
    return (
        sizes, DTYPE_CODES[query.dtype], strided(query), strided(key), strided(value),
        token_ids.data_ptr(), address(bias), scale, head_mean, torch.get_num_threads(),
    )  # fmt: skip


def forward(query, key, value, token_ids, bias, scale, head_mean):
    """Returns out (`None` without values), maps and lse; see `python_ref.attention`."""
    batch, heads, queries, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    tokens = token_ids.shape[1]
    out = None if value is None else query.new_empty(batch, heads, queries, value.shape[3])
    maps_shape = (batch, tokens, queries) if head_mean else (batch, heads, tokens, queries)
    maps = query.new_empty(maps_shape, dtype=wide)
    lse = query.new_empty(batch, heads, queries, dtype=wide)
    native.load("cpu").attention_forward(
        *_call(query, key, value, token_ids, bias, scale, head_mean),
        address(out), maps.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    return out, maps, lse


def backward(
    grad_out, grad_maps, grad_lse, query, key, value, token_ids, bias, out, lse, scale, head_mean,
    need_query, need_key, need_value,
):  # fmt: skip
    """Returns the gradients asked for; see `python_ref.attention`."""

    def result(tensor, needed):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None

    def contiguous(tensor):
        return None if tensor is None else tensor.contiguous()

    grad_maps, grad_lse = contiguous(grad_maps), contiguous(grad_lse)
    grads = result(query, need_query), result(key, need_key), result(value, need_value)
    native.load("cpu").attention_backward(
        *_call(query, key, value, token_ids, bias, scale, head_mean),
        strided(grad_out), address(grad_maps), address(grad_lse),
        strided(None if grad_out is None else out), lse.data_ptr(),
        *(address(grad) for grad in grads),
    )  # fmt: skip
    return grads
