"""Temporal attention by the C++ kernels, on the CPU or an NVIDIA GPU: allocates the results and passes addresses."""

from __future__ import annotations

import math
from functools import partial

import torch

from cvg_kernels import native
from cvg_kernels._layout import dense_like
from cvg_kernels.ops._native_call import DTYPE_CODES, address, strided, threads

_strided = partial(strided, rank=5)


def forward(query, key, value, added, scale, scale_bias_by_row_max, capture):
    """Returns out and maps (`None` without capture); see `cvg_kernels.reference.temporal_attention`."""
    batch, positions, _, frames, _ = query.shape
    out, maps = dense_like(query, value.shape[-1]), None
    if capture:
        wide = torch.promote_types(query.dtype, torch.float32)
        maps = query.new_empty((batch, positions, frames, frames), dtype=wide)
    _run(
        "temporal_attention",
        query.device,
        *_call(query, key, value, added, scale, scale_bias_by_row_max),
        _strided(out),
        address(maps),
    )
    return out, maps


def backward(
    grad_out,
    grad_maps,
    query,
    key,
    value,
    added,
    scale,
    scale_bias_by_row_max,
    row_max_grad,
    need_query,
    need_key,
    need_value,
    need_added,
):
    """Returns the gradients asked for; see `cvg_kernels.reference.temporal_attention`."""
    grad_maps = None if grad_maps is None else grad_maps.contiguous()
    needed = (need_query, need_key, need_value)
    grads = [dense_like(tensor) if need else None for tensor, need in zip((query, key, value), needed, strict=True)]
    sums = added.new_empty((_partial_sums(query), *added.shape)) if need_added else None
    _run(
        "temporal_attention_backward",
        query.device,
        *_call(query, key, value, added, scale, scale_bias_by_row_max),
        _strided(grad_out),
        address(grad_maps),
        row_max_grad,
        *(_strided(grad) for grad in grads),
        address(sums),
    )
    # Float64, and always in the same order.
    grad_added = None if sums is None else sums.sum(0, dtype=torch.float64).to(added.dtype)
    return (*grads, grad_added)


def _call(query, key, value, added, scale, scale_bias_by_row_max) -> tuple:
    """The arguments that both passes begin with."""
    return (
        (*query.shape, value.shape[-1]),
        DTYPE_CODES[query.dtype],
        _strided(query),
        _strided(key),
        _strided(value),
        address(added),
        scale,
        scale_bias_by_row_max,
    )


def _partial_sums(query: torch.Tensor) -> int:
    """How many matrices make up the gradient of `added`: one on the CPU, on a GPU one of each group of warps."""
    if not query.is_cuda:
        return 1
    with torch.cuda.device(query.device):
        sequences = math.prod(query.shape[:3])
        return native.load("cuda").temporal_attention_partial_sums(sequences, query.shape[3])


def _run(name: str, device: torch.device, *given) -> None:
    """Runs a pass where the tensors are, on a GPU in its current stream."""
    if device.type == "cpu":
        getattr(native.load("cpu"), name)(*given, threads())
        return
    with torch.cuda.device(device):
        getattr(native.load("cuda"), name)(*given, torch.cuda.current_stream().cuda_stream)
