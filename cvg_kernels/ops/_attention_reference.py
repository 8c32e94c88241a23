"""The reference as a backend: the closed-form gradient stands in where autograd is below the operation."""

from __future__ import annotations

from cvg_kernels.ops._autocast import autocast_off
from python_ref import attention as reference


def attend(query, key, value, token_ids, mask, scale, head_mean):
    """See `python_ref.attention.attention_with_capture`; `mask` may be dense."""
    with autocast_off(query.device):
        out, maps, lse = reference.attention_with_capture(
            query, key, value, token_ids, scale=scale, mask=mask, head_mean=head_mean
        )
        return out, maps.contiguous(), lse


def forward(query, key, value, token_ids, bias, scale, head_mean):
    """See `python_ref.attention.attention_with_capture`."""
    mask = None if bias is None else bias[:, None, None]
    return attend(query, key, value, token_ids, mask, scale, head_mean)


def backward(
    grad_out, grad_maps, grad_lse, query, key, value, token_ids, bias, out, lse, scale, head_mean,
    need_query, need_key, need_value,
):  # fmt: skip
    """See `python_ref.attention.attention_with_capture_backward`."""
    mask = None if bias is None else bias[:, None, None]
    with autocast_off(query.device):
        grads = reference.attention_with_capture_backward(
            grad_out, grad_maps, grad_lse, query, key, value, token_ids,
            scale=scale, mask=mask, head_mean=head_mean,
        )  # fmt: skip
    needed = (need_query, need_key, need_value)
    return tuple(
        grad.contiguous() if need else None for grad, need in zip(grads, needed, strict=True)
    )
