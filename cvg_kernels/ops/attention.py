"""Attention with capture: the public functions, their checks, their registration with torch, and their backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from cvg_kernels.backends import Backend, parse_backend, require
from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops._trace import note_backend
from python_ref import attention as reference

HeadReduction = Literal["mean", "none"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_HEAD_DIM = 256


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
    the inputs. Differentiable in query, key and value through `out`, `maps` and `lse`; a gradient that nobody asks for
    is not computed. The kernels give first derivatives; `backend="reference"` is differentiable twice.

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
            or bool mask, broadcastable to `[B, H, N, M]`, is served by the reference only. A row with no key seen
            gives out = 0, maps = 0, lse = −∞ and zero gradients.
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
    out, maps, lse = _attend(query, key, value, token_ids, scale, key_mask, head_reduction, backend)
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
    _, maps, lse = _attend(query, key, None, token_ids, scale, key_mask, head_reduction, backend)
    return CapturedMaps(maps, lse)


def _attend(query, key, value, token_ids, scale, key_mask, head_reduction, backend):
    """Checks the arguments, then calls the registered operation, or the reference as it is."""
    backend = parse_backend(backend)
    _check_tensors(query, key, value)
    if head_reduction not in ("mean", "none"):
        raise ArgumentError(f"head_reduction must be 'mean' or 'none', got {head_reduction!r}")
    head_mean = head_reduction == "mean"
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    token_ids = _token_ids(token_ids, query, key)
    bias, dense = _mask(key_mask, query, key)
    if dense and backend not in (Backend.AUTO, Backend.REFERENCE):
        raise ArgumentError(
            f"key_mask of shape {tuple(key_mask.shape)} depends on the query or the head; backend "
            f"{backend.value!r} takes bool [B, M] or additive [B, 1, 1, M] only (the reference takes any)"
        )
    if dense or backend is Backend.REFERENCE:
        note_backend("attention", "reference")
        return reference.attention_with_capture(
            query, key, value, token_ids, scale=scale, mask=bias, head_mean=head_mean
        )
    if bias is not None:
        if bias.requires_grad:
            raise ArgumentError(
                "key_mask must not require a gradient, except with backend='reference'"
            )
        wide = torch.promote_types(query.dtype, torch.float32)
        bias = bias[:, 0, 0].to(wide).contiguous()
    return torch.ops.cvg_kernels.attention_forward(
        query, key, value, token_ids, bias, scale, head_mean, backend.value
    )


def _check_tensors(query, key, value) -> None:
    """Shapes, dtypes and devices of query, key and value."""
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4:
            given = (
                tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            )
            raise ArgumentError(f"{name} must be a tensor [B, H, length, head_dim], got {given}")
        if tensor.dtype not in _DTYPES:
            raise ArgumentError(
                f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if (tensor.dtype, tensor.device) != (query.dtype, query.device):
            raise ArgumentError(
                f"{name} must have the query's dtype and device ({query.dtype}, {query.device}), "
                f"got {tensor.dtype}, {tensor.device}"
            )
        if tensor.shape[:2] != query.shape[:2]:
            raise ArgumentError(
                f"{name} must have the query's batch and heads {tuple(query.shape[:2])}, got "
                f"{tuple(tensor.shape[:2])}"
            )
        if not 1 <= tensor.shape[3] <= _MAX_HEAD_DIM:
            raise ArgumentError(
                f"{name} must have a head_dim of 1 to {_MAX_HEAD_DIM}, got {tensor.shape[3]}"
            )
    if key.shape[3] != query.shape[3]:
        raise ArgumentError(
            f"key must have the query's head_dim {query.shape[3]}, got {key.shape[3]}"
        )
    if value is not None and value.shape[2] != key.shape[2]:
        raise ArgumentError(
            f"value must have the key's length {key.shape[2]}, got {value.shape[2]}"
        )


def _token_ids(token_ids, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Ids as int64 `[B, K]` on the query's device, checked where that is free."""
    on_host = not (isinstance(token_ids, torch.Tensor) and token_ids.device.type != "cpu")
    if not isinstance(token_ids, torch.Tensor):
        token_ids = torch.tensor(token_ids) if len(token_ids) else torch.empty(0, dtype=torch.int64)
    batch, keys = query.shape[0], key.shape[2]
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"token_ids must be int64 or int32, got {token_ids.dtype}")
    if token_ids.ndim not in (1, 2) or (token_ids.ndim == 2 and token_ids.shape[0] != batch):
        raise ArgumentError(
            f"token_ids must have shape [K] or [B, K] with B = {batch}, got {tuple(token_ids.shape)}"
        )
    if token_ids.shape[-1] == 0:
        raise ArgumentError("token_ids must name at least one key, got none")
    if on_host and not torch.compiler.is_compiling() and token_ids.numel():
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= keys:
            raise ArgumentError(
                f"token_ids must lie in [0, {keys}) for {keys} keys, got {low if low < 0 else high}"
            )
    return token_ids.to(query.device, torch.int64).expand(batch, -1).contiguous()


def _mask(key_mask, query, key) -> tuple[torch.Tensor | None, bool]:
    """The mask in additive form, `[B, 1, 1, M]` or denser, and whether it is denser."""
    if key_mask is None:
        return None, False
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    per_key = (batch, 1, 1, keys)
    if key_mask.dtype != torch.bool and not key_mask.is_floating_point():
        raise ArgumentError(f"key_mask must be bool or floating point, got {key_mask.dtype}")
    if key_mask.device != query.device:
        raise ArgumentError(f"key_mask must be on {query.device}, got {key_mask.device}")
    mask = key_mask[:, None, None] if key_mask.ndim == 2 else key_mask
    full = (batch, heads, queries, keys)
    if mask.ndim != 4 or any(
        have not in (1, want) for have, want in zip(mask.shape, full, strict=True)
    ):
        raise ArgumentError(
            f"key_mask must be bool [B, M] = {(batch, keys)}, additive [B, 1, 1, M], or (reference only) broadcast "
            f"to {full}; got {tuple(key_mask.shape)}"
        )
    if mask.dtype == torch.bool:
        wide = torch.promote_types(query.dtype, torch.float32)
        mask = torch.zeros_like(mask, dtype=wide).masked_fill(~mask, -torch.inf)
    dense = mask.shape[1] != 1 or mask.shape[2] != 1
    return (mask if dense else mask.expand(per_key)), dense


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """What `auto` means: the fastest backend that can run on this device, by our benchmarks."""
    from cvg_kernels.backends import unavailable_reason

    preferred = Backend.NATIVE if device.type == "cpu" else Backend.TRITON
    if dtype == torch.float64 and preferred is Backend.TRITON:
        return Backend.REFERENCE
    usable = unavailable_reason("attention", preferred, device) is None
    return preferred if usable else Backend.REFERENCE


def _implementation(backend: str, query: torch.Tensor):
    """The module whose `forward` and `backward` serve this call."""
    chosen = Backend(backend)
    if chosen is Backend.AUTO:
        chosen = choose_backend(query.device, query.dtype)
    require("attention", chosen, query.device)
    if chosen is Backend.TRITON and query.dtype == torch.float64:
        raise ArgumentError(
            "query of dtype torch.float64 is not served by backend 'triton'; it takes float32, bfloat16 and "
            "float16 (use 'native' on the CPU, or 'reference')"
        )
    note_backend("attention", chosen.value)
    if chosen is Backend.NATIVE:
        from cvg_kernels.ops import _attention_native as module
    elif chosen is Backend.TRITON:
        from cvg_kernels._triton import attention as module
    else:
        from cvg_kernels.ops import _attention_reference as module
    return module


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


@torch.library.impl("cvg_kernels::attention_forward", ("cpu", "cuda"))
def _forward(query, key, value, token_ids, bias, scale, head_mean, backend):
    module = _implementation(backend, query)
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
    module = _implementation(backend, query)
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
    if grad_out is None and grad_maps is None and grad_lse is None:
        return (None,) * 8
    need_query, need_key, need_value = ctx.needs_input_grad[:3]
    need_value = need_value and grad_out is not None
    grads = torch.ops.cvg_kernels.attention_backward(
        grad_out, grad_maps, grad_lse, query, key, value, token_ids, bias, out, lse, scale, head_mean,
        need_query, need_key, need_value, backend,
    )  # fmt: skip
    needed = (need_query, need_key, need_value)
    grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return (*grads, None, None, None, None, None)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "attention_with_capture has no second derivative in its kernels; call it with backend='reference', which is "
        "plain PyTorch and can be differentiated twice"
    )


torch.library.register_autograd(
    "cvg_kernels::attention_forward", _differentiate, setup_context=_remember
)
torch.library.register_autograd("cvg_kernels::attention_backward", _no_second_derivative)
