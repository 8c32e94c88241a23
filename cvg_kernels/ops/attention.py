"""Attention with capture: the public functions, their checks, their registration with torch, and their backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from cvg_kernels.backends import Backend, require
from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import _attention_reference as reference
from cvg_kernels.ops._autocast import cast_inputs
from cvg_kernels.ops._dispatch import (
    KERNEL_DEVICES,
    attention_module,
    refuse_second_derivative,
)
from cvg_kernels.ops._trace import note_backend
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate import check_tensors, mask_of, scale_of, token_ids_of

HeadReduction = Literal["mean", "none"]


class CapturedAttention(NamedTuple):
    """What `attention_with_capture` returns."""

    out: torch.Tensor  #: `[B, H, N, Dv]`, the dtype of the query
    maps: torch.Tensor  #: `[B, K, N]` (mean over heads) or `[B, H, K, N]`, float32
    lse: torch.Tensor  #: `[B, H, N]`, float32, natural logarithm


class CapturedMaps(NamedTuple):
    """What `capture_maps` returns."""

    maps: torch.Tensor  #: `[B, K, N]` (mean over heads) or `[B, H, K, N]`, float32
    lse: torch.Tensor  #: `[B, H, N]`, float32, natural logarithm


def attention_with_capture(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    token_ids: torch.Tensor | Sequence[int],
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    head_reduction: HeadReduction = "mean",
    backend: str | Backend = "auto",
) -> CapturedAttention:
    """Scaled dot-product attention that also returns the attention maps of chosen keys.

        P = softmax(scale · q kᵀ + mask);  out = P v;  maps = P[..., token_ids]

    The N×M matrix P is never held (except by the reference backend), and the maps are float32 whatever the dtype of
    the inputs (float64 for float64). Differentiable in query, key and value through `out`, `maps` and `lse`; a gradient
    that nobody asks for is not computed. The kernels give first derivatives; `backend="reference"` is differentiable
    twice. Under autocast the inputs are cast as those of torch's own attention are.

    Args:
        query: `[B, H, N, D]`, float32, bfloat16, float16 or float64 (float64: CPU kernels and reference only), with any
            strides; `[B, N, H, D].transpose(1, 2)` costs no copy.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        token_ids: which keys to capture: `[K]` for the whole batch or `[B, K]`, integers in [0, M); repeats allowed.
            On a GPU a tensor of ids is trusted, since a look at it would wait for the device; on the CPU, and as a
            list, it is checked.
        scale: factor of the logits; `None` is `D ** -0.5`.
        key_mask: `None`; bool `[B, M]`, `True` where a key is seen; or additive float `[B, 1, 1, M]`. A denser additive
            or bool mask, broadcastable to `[B, H, N, M]`, is served by the reference only, since the kernels read one
            row of it per sample. A row with no key seen gives out = 0, maps = 0, lse = −∞ and zero gradients. Only the
            reference gives the mask a gradient.
        head_reduction: `"mean"` averages the maps over the heads, `"none"` keeps them.
        backend: `"auto"`, or the name of one, which then never falls back: `"reference"`, `"native"` (C++, CPU tensors)
            or `"triton"` (GPU tensors).

    Returns:
        `CapturedAttention(out, maps, lse)`.

    Raises:
        ArgumentError: if an argument does not fit; names it, what was given and what is accepted.
        BackendUnavailableError: if the named backend cannot run here; names the reason and the way to get it.

    Maps of cross-attention as guidance signals: Vico (flow equalization) and CVG (composition classifier).
    """
    out, maps, lse = _attend(
        query, key, value, token_ids, scale, key_mask, head_reduction, backend, values=True
    )
    return CapturedAttention(out, maps, lse)


def capture_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    token_ids: torch.Tensor | Sequence[int],
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    head_reduction: HeadReduction = "mean",
    backend: str | Backend = "auto",
) -> CapturedMaps:
    """The attention maps of chosen keys alone: `attention_with_capture` without values, and without their cost.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        token_ids: `[K]` or `[B, K]`.
        scale: factor of the logits; `None` is `D ** -0.5`.
        key_mask: as for `attention_with_capture`.
        head_reduction: `"mean"` or `"none"`.
        backend: as for `attention_with_capture`.

    Returns:
        `CapturedMaps(maps, lse)`.

    Raises:
        ArgumentError: if an argument does not fit.
        BackendUnavailableError: if the named backend cannot run here.
    """
    _, maps, lse = _attend(
        query, key, None, token_ids, scale, key_mask, head_reduction, backend, values=False
    )
    return CapturedMaps(maps, lse)


def _attend(query, key, value, token_ids, scale, key_mask, head_reduction, backend, *, values):
    """Checks the arguments, then calls the registered operation, or the reference as it is."""
    query, key, value = cast_inputs(query, key, value)
    check_tensors(query, key, value, values=values)
    if head_reduction not in ("mean", "none"):
        raise ArgumentError(f"head_reduction must be 'mean' or 'none', got {head_reduction!r}")
    head_mean = head_reduction == "mean"
    scale = scale_of(scale, query)
    backend = backend_under_transforms("attention", backend, (query, key, value, key_mask))
    token_ids = token_ids_of(token_ids, query, key)
    mask = mask_of(key_mask, query, key)
    dense = mask is not None and mask.dense
    if dense and backend not in (Backend.AUTO, Backend.REFERENCE):
        raise ArgumentError(
            f"key_mask of shape {tuple(key_mask.shape)} depends on the query or the head; backend "
            f"{backend.value!r} takes bool [B, M] or additive [B, 1, 1, M] only (the reference takes any)"
        )
    if query.device.type not in KERNEL_DEVICES:
        if backend is not Backend.AUTO:
            require("attention", backend, query.device)
        backend = Backend.REFERENCE
    additive = None if mask is None else mask.values
    if dense or backend is Backend.REFERENCE:
        note_backend("attention", "reference")
        out, maps, lse = reference.attend(query, key, value, token_ids, additive, scale, head_mean)
    else:
        if additive is not None:
            if additive.requires_grad:
                raise ArgumentError(
                    "key_mask must not require a gradient, except with backend='reference'"
                )
            additive = additive[:, 0, 0].contiguous()
        out, maps, lse = _forward_op(
            query, key, value, token_ids, additive, scale, head_mean, backend.value
        )
    if mask is not None and mask.shift is not None:
        lse = lse + mask.shift
    return out, maps, lse


# --- registration ----------------------------------------------------------------------------------------------------
# `None` cannot be returned by an operation: what was not computed is an empty tensor.

torch.library.define(
    "cvg_kernels::attention_forward",
    "(Tensor query, Tensor key, Tensor? value, Tensor token_ids, Tensor? bias, float scale, bool head_mean, "
    "str backend) -> (Tensor out, Tensor maps, Tensor lse)",
)
torch.library.define(
    "cvg_kernels::attention_backward",
    "(Tensor? grad_out, Tensor? grad_maps, Tensor? grad_lse, Tensor query, Tensor key, Tensor? value, "
    "Tensor token_ids, Tensor? bias, Tensor out, Tensor lse, float scale, bool head_mean, bool need_query, "
    "bool need_key, bool need_value, str backend) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
)

_forward_op = torch.ops.cvg_kernels.attention_forward.default
_backward_op = torch.ops.cvg_kernels.attention_backward.default


@torch.library.impl("cvg_kernels::attention_forward", ("cpu", "cuda"))
def _forward(query, key, value, token_ids, bias, scale, head_mean, backend):
    chosen, module = attention_module(Backend(backend), query)
    note_backend("attention", chosen.value)
    out, maps, lse = module.forward(query, key, value, token_ids, bias, scale, head_mean)
    return (query.new_empty(0) if out is None else out), maps, lse


@torch.library.register_fake("cvg_kernels::attention_forward")
def _forward_fake(query, key, value, token_ids, bias, scale, head_mean, backend):
    batch, heads, queries, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    captured = (batch, token_ids.shape[1], queries)
    maps_shape = captured if head_mean else (batch, heads, *captured[1:])
    out_shape = (0,) if value is None else (batch, heads, queries, value.shape[3])
    return (
        query.new_empty(out_shape),
        query.new_empty(maps_shape, dtype=wide),
        query.new_empty((batch, heads, queries), dtype=wide),
    )


@torch.library.impl("cvg_kernels::attention_backward", ("cpu", "cuda"))
def _backward(grad_out, grad_maps, grad_lse, query, key, value, token_ids, bias, out, lse, scale,
              head_mean, need_query, need_key, need_value, backend):  # fmt: skip
    chosen, module = attention_module(Backend(backend), query)
    note_backend("attention_backward", chosen.value)
    if grad_out is None and need_value:
        raise ValueError("need_value: the gradient of value flows through grad_out, which is None")
    grads = module.backward(
        grad_out, grad_maps, grad_lse, query, key, value, token_ids, bias, out, lse, scale, head_mean,
        need_query, need_key, need_value,
    )  # fmt: skip
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("cvg_kernels::attention_backward")
def _backward_fake(grad_out, grad_maps, grad_lse, query, key, value, token_ids, bias, out, lse, scale,
                   head_mean, need_query, need_key, need_value, backend):  # fmt: skip
    def like(tensor, needed):
        return query.new_empty(tensor.shape if needed else (0,))

    return like(query, need_query), like(key, need_key), like(value, need_value)


def _remember(ctx, inputs, output) -> None:
    query, key, value, token_ids, bias, scale, head_mean, backend = inputs
    out, _, lse = output
    ctx.save_for_backward(query, key, value, token_ids, bias, out, lse)
    ctx.options = (scale, head_mean, backend)
    ctx.set_materialize_grads(False)  # an output without a gradient costs no work


def _differentiate(ctx, grad_out, grad_maps, grad_lse):
    query, key, value, token_ids, bias, out, lse = ctx.saved_tensors
    scale, head_mean, backend = ctx.options
    if value is None:
        grad_out = None
    need_query, need_key, need_value = ctx.needs_input_grad[:3]
    need_value = need_value and grad_out is not None
    arrived = any(grad is not None for grad in (grad_out, grad_maps, grad_lse))
    if not (arrived and (need_query or need_key or need_value)):
        return (None,) * 8
    grads = _backward_op(
        grad_out, grad_maps, grad_lse, query, key, value, token_ids, bias, out, lse, scale, head_mean,
        need_query, need_key, need_value, backend,
    )  # fmt: skip
    needed = (need_query, need_key, need_value)
    grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return (*grads, None, None, None, None, None)


torch.library.register_autograd(
    "cvg_kernels::attention_forward", _differentiate, setup_context=_remember
)
refuse_second_derivative("attention")
