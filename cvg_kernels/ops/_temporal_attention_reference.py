"""The reference as a backend: the closed-form gradient stands in where autograd is below the operation."""

from __future__ import annotations

from cvg_kernels._layout import dense_like, with_layout_of
from cvg_kernels.ops._autocast import autocast_off
from cvg_kernels.reference import temporal_attention as reference


def attend(query, key, value, added, scale, scale_bias_by_row_max, row_max_grad, capture):
    """See `cvg_kernels.reference.temporal_attention.temporal_attention`."""
    with autocast_off(query.device):
        return reference.temporal_attention(
            query,
            key,
            value,
            added,
            scale=scale,
            scale_bias_by_row_max=scale_bias_by_row_max,
            row_max_grad=row_max_grad,
            capture=capture,
        )


def forward(query, key, value, added, scale, scale_bias_by_row_max, capture):
    """Returns out and maps (`None` without capture)."""
    out, maps = attend(query, key, value, added, scale, scale_bias_by_row_max, True, capture)
    return dense_like(query, value.shape[-1]).copy_(out), maps


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
    """Returns the gradients asked for; see `cvg_kernels.reference.temporal_attention.temporal_attention_backward`."""
    with autocast_off(query.device):
        *grads, grad_added = reference.temporal_attention_backward(
            grad_out,
            grad_maps,
            query,
            key,
            value,
            added,
            scale=scale,
            scale_bias_by_row_max=scale_bias_by_row_max,
            row_max_grad=row_max_grad,
        )
    needed = (need_query, need_key, need_value)
    return (*with_layout_of(grads, (query, key, value), needed), grad_added if need_added else None)
