"""The attention core by the C++ kernels: allocates the results and passes addresses."""

from __future__ import annotations

import torch

from cvg_kernels import native
from cvg_kernels._layout import dense_like
from cvg_kernels.ops._attention_call import AttentionCall, AttentionGrads, AttentionResult, Needed
from cvg_kernels.ops._native_call import DTYPE_CODES, address, strided, threads


def forward(call: AttentionCall) -> AttentionResult:
    """Attention, the maps of chosen keys and the log-sum-exp; see `_attention_call`."""
    query, rows = call.query, call.query.shape[:3]
    out = None if call.value is None else dense_like(query, call.value.shape[3])
    maps = None if call.token_ids is None else _empty_maps(call)
    lse = query.new_empty(rows, dtype=_wide(call))
    row_max = row_argmax = None
    if call.band is not None:
        row_max = query.new_empty(rows, dtype=_wide(call))
        row_argmax = query.new_empty(rows, dtype=torch.int32)
    native.load("cpu").attention(
        _args(call), strided(out), address(maps), address(lse), address(row_max), address(row_argmax)
    )
    return AttentionResult(out, maps, lse, row_max, row_argmax)


def backward(
    call: AttentionCall, result: AttentionResult, grads: AttentionGrads, needed: Needed
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of query, key, value and token bias that are needed, `None` for the others."""
    tensors = (call.query, call.key, call.value)
    found = [dense_like(tensor) if need else None for tensor, need in zip(tensors, needed[:3], strict=True)]
    bias = None
    if needed.token_bias:
        bias = call.query.new_empty(call.token_bias.shape, dtype=_wide(call))
    grad_maps, grad_lse = (None if grad is None else grad.contiguous() for grad in (grads.maps, grads.lse))
    native.load("cpu").attention_backward(
        _args(call),
        strided(grads.out),
        address(grad_maps),
        address(grad_lse),
        strided(None if grads.out is None else result.out),
        address(result.lse),
        address(result.row_max),
        address(result.row_argmax),
        *map(strided, found),
        address(bias),
    )
    return (*found, bias)


def capture(call: AttentionCall, lse: torch.Tensor) -> torch.Tensor:
    """The maps from a known log-sum-exp; under a band, whose m takes all keys to find, by a pass over these."""
    if call.band is not None:
        return forward(call._replace(value=None)).maps
    maps = _empty_maps(call)
    native.load("cpu").attention_capture(_args(call), address(lse), address(maps))
    return maps


def _wide(call: AttentionCall) -> torch.dtype:
    return torch.promote_types(call.query.dtype, torch.float32)


def _empty_maps(call: AttentionCall) -> torch.Tensor:
    batch, heads, queries = call.query.shape[:3]
    captured = (call.token_ids.shape[1], queries)
    shape = (batch, *captured) if call.head_mean else (batch, heads, *captured)
    return call.query.new_empty(shape, dtype=_wide(call))


def _args(call: AttentionCall):
    """The arguments in the module's form: addresses, which live no longer than the call's tensors."""
    query, key, value, ids, band = call.query, call.key, call.value, call.token_ids, call.band
    value_dim = 0 if value is None else value.shape[3]
    tokens = 0 if ids is None else ids.shape[1]
    return native.load("cpu").AttentionArgs(
        (*query.shape[:3], key.shape[2], query.shape[3], value_dim, tokens),
        DTYPE_CODES[query.dtype],
        strided(query),
        strided(key),
        strided(value),
        address(ids),
        address(call.key_bias),
        strided(call.token_bias),
        band and (address(band.query_frames), address(band.key_frames), *band[2:]),
        call.scale,
        call.head_mean,
        threads(),
    )
