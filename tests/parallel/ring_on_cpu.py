"""The kernel that ring attention needs and no CPU has: attention that returns its log-sum-exp, and goes back by it.

What diffusers does around it, the exchange of keys, values and their gradients, is its own.
"""

from __future__ import annotations

import math

import torch
from diffusers.models import attention_dispatch


def _logits(query, key, scale):
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return torch.einsum("bnhd,bmhd->bhnm", query, key) * scale


def _forward(
    ctx,
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    return_lse=False,
    _save_ctx=True,
    _parallel_config=None,
):
    assert attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if _save_ctx:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
    logits = _logits(query, key, scale)
    lse = logits.logsumexp(-1)  # [B, heads, N]
    out = torch.einsum("bhnm,bmhd->bnhd", (logits - lse[..., None]).exp(), value)
    return (out, lse.movedim(1, 2)) if return_lse else out


def _backward(ctx, grad_out, *_, query, key, value, out, lse):
    weights = (_logits(query, key, ctx.scale) - lse.movedim(1, 2)[..., None]).exp()
    grad_value = torch.einsum("bhnm,bnhd->bmhd", weights, grad_out)
    inner = torch.einsum("bnhd,bmhd->bhnm", grad_out, value)
    outer = (grad_out * out).sum(-1).movedim(1, 2)[..., None]
    scale = 1 / math.sqrt(query.shape[-1]) if ctx.scale is None else ctx.scale
    logits = weights * (inner - outer) * scale
    grad_query = torch.einsum("bhnm,bmhd->bnhd", logits, key)
    grad_key = torch.einsum("bhnm,bnhd->bmhd", logits, query)
    return grad_query, grad_key, grad_value


def install() -> None:
    """Puts the kernel in the place of flash attention, in this process."""
    attention_dispatch._native_flash_attention_forward_op = _forward
    attention_dispatch._native_flash_attention_backward_op = _backward
