"""Attention with capture: the public functions and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from cvg_kernels.backends import Backend, parse_backend
from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import _attention_op as operation
from cvg_kernels.ops import _attention_reference as reference
from cvg_kernels.ops._attention_call import AttentionCall, AttentionResult
from cvg_kernels.ops._autocast import cast_inputs
from cvg_kernels.ops._registration import backend_on
from cvg_kernels.ops._trace import note_backend
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate import check_tensors, normalize_mask, normalize_scale
from cvg_kernels.ops._validate_tokens import normalize_token_bias, normalize_token_ids
from cvg_kernels.ops.frame_band_attention import FrameBand, checked_band

HeadReduction = Literal["mean", "none"]


class CapturedAttention(NamedTuple):
    """What `attention_with_capture` returns.

    Attributes:
        out: `[B, H, N, Dv]`, the dtype of the query.
        maps: `[B, K, N]` (mean over heads) or `[B, H, K, N]`, float32; `None` without token ids.
        lse: `[B, H, N]`, float32, natural logarithm.
    """

    out: torch.Tensor
    maps: torch.Tensor | None
    lse: torch.Tensor


class CapturedMaps(NamedTuple):
    """What `capture_maps` returns.

    Attributes:
        maps: `[B, K, N]` (mean over heads) or `[B, H, K, N]`, float32.
        lse: `[B, H, N]`, float32, natural logarithm.
    """

    maps: torch.Tensor
    lse: torch.Tensor


def attention_with_capture(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    token_ids: torch.Tensor | Sequence[int] | None,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    token_bias: torch.Tensor | None = None,
    band: FrameBand | None = None,
    head_reduction: HeadReduction = "mean",
    deterministic: bool | None = None,
    backend: str | Backend = "auto",
) -> CapturedAttention:
    """Scaled dot-product attention that also returns the attention maps of chosen keys.

        S = scale · q kᵀ + mask;  S[..., token_ids] += token_bias
        P = softmax(S);  out = P v;  maps = P[..., token_ids]

    The N×M matrix P is never held (except by the reference backend), and the maps are float32 whatever the dtype of
    the inputs (float64 for float64). Differentiable in query, key, value and token bias through `out`, `maps` and
    `lse`; a gradient that nobody asks for is not computed. The kernels give first derivatives; `backend="reference"`
    is differentiable twice. Under autocast the inputs are cast as those of torch's own attention are.

    Args:
        query: `[B, H, N, D]`, float32, bfloat16, float16 or float64 (float64: CPU kernels and reference only), with
            any strides; `[B, N, H, D].transpose(1, 2)` costs no copy.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        token_ids: which keys to capture: `[K]` for the whole batch or `[B, K]`, integers in [0, M); repeats allowed;
            `None` captures none. On a GPU a tensor of ids is trusted, since a look at it would wait for the device; on
            the CPU, and as a list, it is checked. A list is copied to the GPU once and kept.
        scale: factor of the logits; `None` is `D ** -0.5`.
        key_mask: `None`; bool `[B, M]`, `True` where a key is seen; or additive float `[B, 1, 1, M]`. A denser
            additive or bool mask, broadcastable to `[B, H, N, M]`, is served by the reference only, since the kernels
            read one row of it per sample. A row with no key seen gives out = 0, maps = 0, lse = −∞ and zero gradients.
            Only the reference gives the mask a gradient.
        token_bias: added to the logits of the chosen keys, floating point `[K]`, `[B, K]` or `[B, K, N]`: a key that
            occurs twice gets both. log w re-weights a token by w; a bias per query is a layout. Not with a band.
        band: attention under a band by the distance of frames, as `frame_band_attention` has it; not with a mask.
        head_reduction: `"mean"` averages the maps over the heads, `"none"` keeps them.
        deterministic: whether gradients must be the same bit by bit in every run; `None` is what
            `torch.use_deterministic_algorithms` says. Our own kernels always are; torch's fused ones on a GPU are not,
            and are then left aside.
        backend: `"auto"`, or the name of one, which then never falls back: `"reference"`, `"native"` (C++, CPU
            tensors), `"triton"` (GPU tensors), `"triton_specialised"` (the same with specialised warps on Hopper:
            16-bit numbers, head_dim 64 or 128, no mask, bias or band) or `"stock"` (torch's fused attention, and the
            maps from its log-sum-exp).

    Returns:
        `CapturedAttention(out, maps, lse)`.

    Raises:
        ArgumentError: if an argument does not fit; names it, what was given and what is accepted.
        BackendUnavailableError: if the named backend cannot run here; names the reason and the way to get it.

    Maps of cross-attention as guidance signals: Vico (flow equalization) and CVG (composition classifier).

    Examples:
        >>> query, (key, value) = torch.randn(1, 8, 64, 32), torch.randn(2, 1, 8, 77, 32)
        >>> out, maps, lse = cvg.attention_with_capture(query, key, value, token_ids=[2, 5])
        >>> out.shape, maps.shape, lse.shape
        (torch.Size([1, 8, 64, 32]), torch.Size([1, 2, 64]), torch.Size([1, 8, 64]))
    """
    found = _attend(
        query,
        key,
        value,
        token_ids,
        values=True,
        scale=scale,
        key_mask=key_mask,
        token_bias=token_bias,
        band=band,
        head_reduction=head_reduction,
        deterministic=deterministic,
        backend=backend,
    )
    assert found.out is not None  # of the values
    return CapturedAttention(found.out, None if token_ids is None else found.maps, found.lse)


def capture_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    token_ids: torch.Tensor | Sequence[int],
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    token_bias: torch.Tensor | None = None,
    band: FrameBand | None = None,
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
        token_bias: as for `attention_with_capture`.
        band: as for `attention_with_capture`.
        head_reduction: `"mean"` or `"none"`.
        backend: as for `attention_with_capture`.

    Returns:
        `CapturedMaps(maps, lse)`.

    Raises:
        ArgumentError: if an argument does not fit.
        BackendUnavailableError: if the named backend cannot run here.

    Examples:
        >>> query, key = torch.randn(1, 8, 64, 32), torch.randn(1, 8, 77, 32)
        >>> cvg.capture_maps(query, key, token_ids=[2, 5]).maps.shape
        torch.Size([1, 2, 64])
    """
    if token_ids is None:
        raise ArgumentError("token_ids must name the keys whose maps are wanted, got None")
    found = _attend(
        query,
        key,
        None,
        token_ids,
        values=False,
        scale=scale,
        key_mask=key_mask,
        token_bias=token_bias,
        band=band,
        head_reduction=head_reduction,
        deterministic=None,
        backend=backend,
    )
    assert found.maps is not None  # of the tokens
    return CapturedMaps(found.maps, found.lse)


def attention_alone(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """Attention of which nothing but the output is wanted: under `auto` torch's own.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        scale: factor of the logits; `None` is `D ** -0.5`.
        key_mask: a mask of torch's own attention with four dimensions, or `None`.
        backend: `"auto"`, or the name of one of `attention_with_capture`.

    Examples:
        >>> from cvg_kernels.ops import attention_alone
        >>> query, (key, value) = torch.randn(1, 8, 64, 32), torch.randn(2, 1, 8, 77, 32)
        >>> attention_alone(query, key, value).shape
        torch.Size([1, 8, 64, 32])
    """
    if parse_backend(backend) is not Backend.AUTO:
        return attention_with_capture(query, key, value, None, scale=scale, key_mask=key_mask, backend=backend).out
    note_backend("attention", Backend.STOCK.value)
    return scaled_dot_product_attention(query, key, value, key_mask, scale=scale)


def _attend(
    query, key, value, token_ids, *, values, scale, key_mask, token_bias, band, head_reduction, deterministic, backend
) -> AttentionResult:
    """Checks the arguments, then calls the registered operation, or the reference as it is."""
    query, key, value = cast_inputs(query, key, value)
    check_tensors(query, key, value, values=values)
    if head_reduction not in ("mean", "none"):
        raise ArgumentError(f"head_reduction must be 'mean' or 'none', got {head_reduction!r}")
    if deterministic not in (None, True, False):
        raise ArgumentError(f"deterministic must be True, False or None, got {deterministic!r}")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    scale = normalize_scale(scale, query)
    backend = backend_under_transforms("attention", backend, (query, key, value, key_mask, token_bias))
    if token_ids is not None:
        token_ids = normalize_token_ids(token_ids, query, key)
    if token_bias is not None:
        token_bias = normalize_token_bias(token_bias, token_ids, query)
    if band is not None:
        for name, other in (("key_mask", key_mask), ("token_bias", token_bias)):
            if other is not None:
                raise ArgumentError(f"{name} cannot be combined with a band; give one of them")
        band = checked_band(band, query, key)
    mask = normalize_mask(key_mask, query, key)
    dense = mask is not None and mask.dense
    if dense and backend not in (Backend.AUTO, Backend.REFERENCE):
        raise ArgumentError(
            f"key_mask of shape {tuple(key_mask.shape)} depends on the query or the head; backend "
            f"{backend.value!r} takes bool [B, M] or additive [B, 1, 1, M] only (the reference takes any)"
        )
    backend = backend_on("attention", backend, query.device)
    additive = None if mask is None else mask.values
    head_mean = head_reduction == "mean"
    by_definition = dense or backend is Backend.REFERENCE
    key_bias = None
    if additive is not None and not by_definition:
        if additive.requires_grad:
            raise ArgumentError("key_mask must not require a gradient, except with backend='reference'")
        key_bias = additive[:, 0, 0].contiguous()
    call = AttentionCall(query, key, value, token_ids, key_bias, token_bias, band, scale, head_mean)
    if by_definition:
        note_backend(operation.operation_of(call), "reference")
        found = reference.attend(call, additive)
    else:
        found = operation.attend(call, deterministic, backend)
    if mask is not None and mask.shift is not None:
        out, maps, lse, *of_band = found
        found = AttentionResult(out, maps, lse + mask.shift, *of_band)
    return found
