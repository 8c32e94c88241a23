"""Temporal attention: the public function, its checks, its registration with torch, and its backends."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cvg_kernels._layout import dense_like
from cvg_kernels.backends import Backend
from cvg_kernels.errors import check_flag
from cvg_kernels.kernels import Facts
from cvg_kernels.ops import _temporal_attention_reference as reference
from cvg_kernels.ops._autocast import cast_inputs
from cvg_kernels.ops._choice import run_kernel
from cvg_kernels.ops._registration import backend_on, forbid_double_backward
from cvg_kernels.ops._trace import note_backend, register_autograd
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate import normalize_scale
from cvg_kernels.ops._validate_temporal import added_logits, check_tensors


class TemporalAttention(NamedTuple):
    """What `temporal_attention` returns.

    Attributes:
        out: `[P, H, F, Dv]`, the dtype of the query.
        maps: `[P, F, F]` (mean over heads), float32; `None` without capture.
    """

    out: torch.Tensor
    maps: torch.Tensor | None


def temporal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    sigma: float | torch.Tensor | None = None,
    strength: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    row_max_grad: bool = True,
    capture: bool = False,
    backend: str | Backend = "auto",
) -> TemporalAttention:
    """Attention among the frames of every position, with VSTAR's regularisation of its maps.

        S  = scale · q kᵀ;  m_i = max_j S_ij
        S' = S + strength · m · exp(−(i − j)² / 2σ²),  or S + bias,  or S alone
        P  = softmax(S');  out = P v;  maps = mean of P over the heads

    Differentiable in query, key and value through `out` and `maps`, and in sigma, strength and bias where they are
    tensors that require it. The gradient is the true one: it also flows through m, to the first of the keys that tie
    for the maximum. The kernels give first derivatives; `backend="reference"` is differentiable twice. Under autocast
    the inputs are cast as those of torch's own attention are.

    Args:
        query: `[P, H, F, D]`, positions, heads, frames, head_dim: float32, bfloat16, float16 or float64 (float64: CPU
            kernels and reference only), with any strides, read without a copy. The positions may be two axes,
            `[B, P, H, F, D]`: the `[B·F, h·w, H·D]` that a UNet's convolutions leave behind is then the view
            `unflatten(0, (B, F)).unflatten(-1, (H, D)).permute(0, 2, 3, 1, 4)`.
        key: `[P, H, F, D]`.
        value: `[P, H, F, Dv]`.
        sigma: width of the band in frames, above 0, a number or a 0-d tensor; smaller is stronger. `None`: no band.
        strength: factor of the band, a number or a 0-d tensor. Where m is negative the band lowers the diagonal.
        bias: any additive `[F, F]` instead of the band, not scaled by m; −∞ hides a key. A row that sees no key gives
            out = 0 and zero gradients.
        scale: factor of the logits; `None` is `D ** -0.5`.
        row_max_grad: `False` takes m as a constant in the backward pass.
        capture: whether to return the maps.
        backend: `"auto"`, or the name of one, which then never falls back: `"reference"`, `"native"` (C++, CPU
            tensors), `"triton"` (GPU tensors; up to 128 frames, 32 in float32, and head_dim up to 128) or `"cuda"`
            (NVIDIA GPUs, bfloat16 and float16; 16 to 128 frames, head_dim up to 160). On a GPU `auto` is triton, and
            the reference for what is larger; `cuda` has not been measured against it and serves only when named.

    Returns:
        `TemporalAttention(out, maps)`: out lies in memory as the query does; maps `[P, F, F]`, row = attending frame,
        float32 whatever the dtype of the inputs (float64 for float64), or `None`.

    Raises:
        ArgumentError: if an argument does not fit; names it, what was given and what is accepted.
        BackendUnavailableError: if the named backend cannot run here; names the reason and the way to get it.

    Temporal attention regularisation of "VSTAR: Generative Temporal Nursing for Longer Dynamic Video Synthesis".

    Examples:
        >>> query, key, value = torch.randn(3, 64, 8, 16, 40)  # 64 positions, 8 heads, 16 frames
        >>> out, maps = cvg.temporal_attention(query, key, value, sigma=4.0, capture=True)
        >>> out.shape, maps.shape
        (torch.Size([64, 8, 16, 40]), torch.Size([64, 16, 16]))
    """
    query, key, value = cast_inputs(query, key, value)
    check_tensors(query, key, value)
    scale = normalize_scale(scale, query)
    check_flag("row_max_grad", row_max_grad)
    check_flag("capture", capture)
    added = added_logits(query, sigma, strength, bias)
    scale_bias_by_row_max = sigma is not None
    backend = backend_under_transforms("temporal_attention", backend, (query, key, value, added))
    backend = backend_on("temporal_attention", backend, query.device)
    if backend is Backend.REFERENCE:
        note_backend("temporal_attention", "reference")
        return TemporalAttention(
            *reference.attend(query, key, value, added, scale, scale_bias_by_row_max, row_max_grad, capture)
        )
    one_axis = query.ndim == 4
    if one_axis:
        query, key, value = query[None], key[None], value[None]
    out, maps = _forward_op(
        query, key, value, added, scale, scale_bias_by_row_max, row_max_grad, capture, backend.value
    )
    if one_axis:  # squeezed, not indexed: the gradient of an index is a copy
        out, maps = out.squeeze(0), maps.squeeze(0)
    return TemporalAttention(out, maps if capture else None)


# --- registration ----------------------------------------------------------------------------------------------------
# Positions are two axes here, [B, P, H, F, D]. `None` cannot be returned by an operation: what was not computed is an
# empty tensor.

torch.library.define(
    "cvg_kernels::temporal_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? added, float scale, bool scale_bias_by_row_max, "
    "bool row_max_grad, bool capture, str backend) -> (Tensor out, Tensor maps)",
)
torch.library.define(
    "cvg_kernels::temporal_attention_backward",
    "(Tensor? grad_out, Tensor? grad_maps, Tensor query, Tensor key, Tensor value, Tensor? added, float scale, "
    "bool scale_bias_by_row_max, bool row_max_grad, bool need_query, bool need_key, bool need_value, bool need_added, "
    "str backend) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_added)",
)

_forward_op = torch.ops.cvg_kernels.temporal_attention.default
_backward_op = torch.ops.cvg_kernels.temporal_attention_backward.default


def _facts(query: torch.Tensor, value: torch.Tensor) -> Facts:
    frames, head_dim = query.shape[-2:]
    return Facts(query.device, query.dtype, frames=frames, head_dim=head_dim, value_dim=value.shape[-1])


@torch.library.impl("cvg_kernels::temporal_attention", ("cpu", "cuda"))
def _forward(query, key, value, added, scale, scale_bias_by_row_max, row_max_grad, capture, backend):
    out, maps = run_kernel(
        "temporal_attention",
        backend,
        _facts(query, value),
        lambda module: module.forward(query, key, value, added, scale, scale_bias_by_row_max, capture),
    )
    return out, (query.new_empty(0) if maps is None else maps)


@torch.library.register_fake("cvg_kernels::temporal_attention")
def _forward_fake(query, key, value, added, scale, scale_bias_by_row_max, row_max_grad, capture, backend):
    batch, positions, _, frames, _ = query.shape
    out = dense_like(query, value.shape[-1])
    if not capture:
        return out, query.new_empty(0)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty((batch, positions, frames, frames), dtype=wide)


@torch.library.impl("cvg_kernels::temporal_attention_backward", ("cpu", "cuda"))
def _backward(
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
    backend,
):
    if grad_out is None and need_value:
        raise ValueError("need_value: the gradient of value flows through grad_out, which is None")
    grads = run_kernel(
        "temporal_attention_backward",
        backend,
        _facts(query, value),
        lambda module: module.backward(
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
        ),
    )
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("cvg_kernels::temporal_attention_backward")
def _backward_fake(
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
    backend,
):
    def like(tensor, needed):
        return dense_like(tensor) if needed else query.new_empty(0)

    grad_added = torch.empty_like(added) if need_added else query.new_empty(0)
    return like(query, need_query), like(key, need_key), like(value, need_value), grad_added


def _remember(ctx, inputs, output) -> None:
    query, key, value, added, *options = inputs
    scale, scale_bias_by_row_max, row_max_grad, _, backend = options
    ctx.save_for_backward(query, key, value, added)
    ctx.options = (scale, scale_bias_by_row_max, row_max_grad, backend)
    ctx.set_materialize_grads(False)  # an output without a gradient costs no work


def _differentiate(ctx, grad_out, grad_maps):
    query, key, value, added = ctx.saved_tensors
    *options, backend = ctx.options
    need_query, need_key, need_value, need_added = ctx.needs_input_grad[:4]
    need_value = need_value and grad_out is not None
    needed = (need_query, need_key, need_value, need_added)
    if not ((grad_out is not None or grad_maps is not None) and any(needed)):
        return (None,) * 9
    grads = _backward_op(grad_out, grad_maps, query, key, value, added, *options, *needed, backend)
    grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return (*grads, None, None, None, None, None)


register_autograd("cvg_kernels::temporal_attention", _differentiate, setup_context=_remember)
forbid_double_backward("temporal_attention")
