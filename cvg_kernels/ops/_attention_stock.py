"""Torch's fused attention as a backend: out and log-sum-exp from torch's own operator, the maps from the log-sum-exp.

On long keys the maps are K of M columns, and cost nothing beside attention itself. The backward pass:

* no gradient through maps or log-sum-exp: torch's own;
* with one: torch's own, which is told of it in spare columns, two where 16 bits do not hold a number:

      x = dlse − Σ_κ dC ∘ C,   v' = [v, 1, 1],   dO' = [dO, x_hi, x_lo],   out' = [out, 0, 0]
      dS = P ∘ (dO' v'ᵀ − Σ dO' ∘ out') = P ∘ (dO vᵀ − δ + x)

  and what reaches single columns is two small products: dq += scale · (C ∘ dC) k_sel, dk[ids] += scale · (C ∘ dC)ᵀ q.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import torch
from torch.nn.functional import pad

from cvg_kernels._layout import dense_like, lies_like
from cvg_kernels.errors import BackendUnavailableError
from cvg_kernels.kernels import Backend, kernels_of
from cvg_kernels.ops import _attention_reference as reference
from cvg_kernels.ops._attention_call import AttentionCall, AttentionGrads, AttentionResult, Needed, facts_of
from cvg_kernels.ops._autocast import autocast_off
from cvg_kernels.ops._choice import why_not
from cvg_kernels.ops._fused_attention import FusedOperator, operator_for, operators_of, unfit

#: Numbers of maps that are made at once where no kernel makes them.
_BLOCK = 2**24


def reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch has no fused attention for a device and dtype, or `None`."""
    operators = [one for one in operators_of(device) if dtype in one.dtypes]
    if not operators:
        return f"torch has no fused attention that returns its log-sum-exp for {dtype} on {device.type}"
    reasons = [unfit(one, device, dtype) for one in operators]
    if None in reasons:
        return None
    return "; ".join(f"{one.name}: {why}" for one, why in zip(operators, reasons, strict=True))


def forward(call: AttentionCall) -> AttentionResult:
    """Out and log-sum-exp by torch, then the maps."""
    if call.query.numel() == 0:  # which not all of torch's operators take
        return reference.forward(call)
    query, key, value = (_dense_last(tensor) for tensor in (call.query, call.key, call.value))
    out, lse = _operator(call).forward(query, key, value, call.scale)
    lse = lse.contiguous()
    maps = None if call.token_ids is None else capture(call, lse)
    return AttentionResult(_laid_out(out, call.query), maps, lse)


def backward(
    call: AttentionCall, result: AttentionResult, grads: AttentionGrads, needed: Needed
) -> tuple[torch.Tensor | None, ...]:
    """The gradients asked for."""
    if call.query.numel() == 0:
        return reference.backward(call, result, grads, needed)
    operator, dim = _operator(call), call.query.shape[-1]
    given = (_dense_last(call.query), _dense_last(call.key), _dense_last(call.value))
    out, lse = result.out, result.lse
    grad_out = torch.zeros_like(out) if grads.out is None else _dense_last(grads.out)
    if grads.maps is not None or grads.lse is not None:
        through = torch.zeros_like(lse) if grads.lse is None else grads.lse.clone()  # x
        if grads.maps is not None:
            for heads, shares, _ in _columns(call, lse, grads.maps):
                through[:, heads] -= shares.sum(2)
        given, out, grad_out = _with_spare_columns(operator, *given, out, grad_out, through)
    found = [grad[..., :dim] for grad in operator.backward(grad_out, *given, out, lse, call.scale)]
    if grads.maps is not None:
        _add_columns(call, lse, grads.maps, found, needed)
    tensors = (call.query, call.key, call.value)
    laid = (
        _laid_out(grad, tensor) if need else None
        for grad, tensor, need in zip(found, tensors, needed[:3], strict=True)
    )
    return (*laid, None)


def capture(call: AttentionCall, lse: torch.Tensor) -> torch.Tensor:
    """The maps by the kernel of the device, or in plain operations, a few heads at a time, where there is none."""
    kernels = _kernels_of(call)
    if kernels is not None:
        return kernels.capture(call, lse)
    (batch, heads, queries), tokens = lse.shape, call.token_ids.shape[1]
    if not call.head_mean:
        maps = lse.new_empty(batch, heads, tokens, queries)
        for block, found, _ in _columns(call, lse, None):
            maps[:, block] = found
        return maps
    maps = lse.new_zeros(batch, tokens, queries)
    for _, found, _ in _columns(call, lse, None):
        maps += found.sum(1)
    return maps / heads


def _kernels_of(call: AttentionCall) -> ModuleType | None:
    backend = Backend.NATIVE if call.query.device.type == "cpu" else Backend.TRITON
    if why_not("attention", backend, facts_of(call)) is not None:
        return None
    return import_module(kernels_of("attention")[backend].module)


def _operator(call: AttentionCall) -> FusedOperator:
    operator = operator_for(call.query, call.value)
    if operator is None:
        dims = f"head dimensions {call.query.shape[-1]} and {call.value.shape[-1]}"
        raise BackendUnavailableError(
            f"backend 'stock' cannot run attention in {call.query.dtype} with {dims} on {call.query.device}: torch "
            "has no fused attention for it"
        )
    return operator


def _columns(
    call: AttentionCall, lse: torch.Tensor, grad_maps: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """By blocks of heads: which heads, C `[B, h, K, N]` (C ∘ dC with `grad_maps`), the chosen keys `[B, h, K, D]`."""
    (batch, heads, queries), tokens = lse.shape, call.token_ids.shape[1]
    step = max(1, _BLOCK // max(1, batch * queries * max(tokens, call.query.shape[-1])))
    with autocast_off(lse.device):
        for first in range(0, heads, step):
            block = slice(first, first + step)
            ids = call.token_ids[:, None, :, None]
            keys = call.key[:, block].take_along_dim(ids, dim=2).to(lse.dtype)
            scores = call.scale * (keys @ call.query[:, block].to(lse.dtype).mT)
            columns = scores.sub_(lse[:, block, None]).exp_()
            if grad_maps is not None:
                columns *= grad_maps[:, None] / heads if call.head_mean else grad_maps[:, block]
            yield block, columns, keys


def _with_spare_columns(operator, query, key, value, out, grad_out, through):
    """(query, key, value), out and grad_out with the columns that carry x."""
    halves = [through.to(query.dtype)]
    if query.element_size() == 2:
        halves.append((through - halves[0]).to(query.dtype))
    ones = value.new_ones(*value.shape[:-1], len(halves))
    spare = len(halves) + (-value.shape[-1] - len(halves)) % operator.multiple
    more = spare - len(halves)
    grad_out = pad(torch.cat([grad_out, torch.stack(halves, -1)], -1), (0, more))
    value = pad(torch.cat([value, ones], -1), (0, more))
    given = (pad(query, (0, spare)), pad(key, (0, spare)), value)
    return given, pad(out, (0, spare)), grad_out


def _add_columns(call, lse, grad_maps, found, needed) -> None:
    """What reaches single columns: dq += scale · (C ∘ dC) k_sel and dk[ids] += scale · (C ∘ dC)ᵀ q, in float32."""
    grad_query, grad_key, _ = found
    if not (needed.query or needed.key):
        return
    through_maps = torch.zeros(call.key.shape, dtype=lse.dtype, device=lse.device) if needed.key else None
    for block, shares, keys in _columns(call, lse, grad_maps):
        with autocast_off(lse.device):
            if needed.query:
                grad_query[:, block] += call.scale * (shares.mT @ keys)
            if through_maps is not None:
                rows = call.scale * (shares @ call.query[:, block].to(lse.dtype))
                ids = call.token_ids[:, None, :, None].expand(rows.shape)
                through_maps[:, block].scatter_add_(2, ids, rows)
    if through_maps is not None:
        grad_key += through_maps


def _dense_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with an innermost last axis, which torch's operators take for granted."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor in memory as `dense_like(like)`: as it is, where torch put it there already."""
    return tensor if lies_like(tensor, like) else dense_like(like, tensor.shape[-1]).copy_(tensor)
