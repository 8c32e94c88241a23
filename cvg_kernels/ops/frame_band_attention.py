"""Attention with a band by frame distance: the public function, its checks, its registration, and its backends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cvg_kernels._layout import dense_like
from cvg_kernels.backends import Backend, require
from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import _frame_band_attention_reference as reference
from cvg_kernels.ops._autocast import cast_inputs
from cvg_kernels.ops._dispatch import (
    KERNEL_DEVICES,
    frame_band_attention_module,
    refuse_second_derivative,
)
from cvg_kernels.ops._trace import note_backend
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate import can_look_at, check_tensors, scale_of

#: The largest frame number: distances are exact in float32.
_MAX_FRAME = 2**24 - 1
#: A narrower band is this one: exp(−1 / 2σ²) is 0 in float64 already.
_NARROWEST = 0.01


class FrameBandAttention(NamedTuple):
    """What `frame_band_attention` returns."""

    out: torch.Tensor  #: `[B, H, N, Dv]`, the dtype of the query
    lse: torch.Tensor  #: `[B, H, N]`, float32, natural logarithm


def frame_band_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_frames: torch.Tensor | Sequence[int],
    key_frames: torch.Tensor | Sequence[int],
    *,
    sigma: float,
    strength: float = 1.0,
    scale: float | None = None,
    row_max_grad: bool = True,
    backend: str | Backend = "auto",
) -> FrameBandAttention:
    """Attention among all tokens of a video, with VSTAR's band by the distance of their frames.

        S  = scale · q kᵀ;  m_i = max_j S_ij
        S' = S + strength · m · exp(−(f_i − f_j)² / 2σ²)      where both tokens belong to a frame, S elsewhere
        P  = softmax(S');  out = P v;  lse_i = log Σ_j exp(S'_ij)

    The N×M matrix is never held (except by the reference backend): a first pass over the keys finds m, a second one is
    flash attention with the band added. Differentiable in query, key and value through `out` and `lse`. The gradient is
    the true one: it also flows through m, to the first of the keys that tie for the maximum. The kernels give first
    derivatives; `backend="reference"` is differentiable twice. Under autocast the inputs are cast as those of torch's own
    attention are.

    Args:
        query: `[B, H, N, D]`, float32, bfloat16, float16 or float64 (float64: CPU kernels and reference only), with any
            strides; `[B, N, H, D].transpose(1, 2)` costs no copy.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        query_frames: the frame of each query, integers `[N]` from 0; −1 marks a token of no frame (a text token of joint
            attention), which neither gives nor gets a band. On a GPU a tensor of frames is trusted, since a look at it
            would wait for the device; on the CPU, and as a list, it is checked.
        key_frames: the frame of each key, `[M]`.
        sigma: width of the band in frames, a number above 0; smaller is stronger.
        strength: factor of the band, finite. Where m is negative the band lowers the logits of near frames.
        scale: factor of the logits; `None` is `D ** -0.5`.
        row_max_grad: `False` takes m as a constant in the backward pass.
        backend: `"auto"`, or the name of one, which then never falls back: `"reference"`, `"native"` (C++, CPU tensors)
            or `"triton"` (GPU tensors).

    Returns:
        `FrameBandAttention(out, lse)`: out lies in memory as the query does.

    Raises:
        ArgumentError: if an argument does not fit; names it, what was given and what is accepted.
        BackendUnavailableError: if the named backend cannot run here; names the reason and the way to get it.

    An extension to networks without temporal layers of "VSTAR: Generative Temporal Nursing for Longer Dynamic Video
    Synthesis", which regularises temporal attention only.
    """
    query, key, value = cast_inputs(query, key, value)
    check_tensors(query, key, value, values=True)
    scale = scale_of(scale, query)
    sigma, strength = _number("sigma", sigma), _number("strength", strength)
    if not sigma > 0:
        raise ArgumentError(f"sigma must be above 0, got {sigma}")
    if not math.isfinite(strength):
        raise ArgumentError(f"strength must be finite, got {strength}")
    query_frames = _frames_of("query_frames", query_frames, query.shape[2], query.device)
    key_frames = _frames_of("key_frames", key_frames, key.shape[2], query.device)
    backend = backend_under_transforms("frame_band_attention", backend, (query, key, value))
    call = (query, key, value, query_frames, key_frames, scale, max(sigma, _NARROWEST), strength)
    if query.device.type not in KERNEL_DEVICES:
        if backend is not Backend.AUTO:
            require("frame_band_attention", backend, query.device)
        backend = Backend.REFERENCE
    if backend is Backend.REFERENCE:
        note_backend("frame_band_attention", "reference")
        return FrameBandAttention(*reference.attend(*call, row_max_grad))
    out, lse, _, _ = _forward_op(*call, row_max_grad, backend.value)
    return FrameBandAttention(out, lse)


def _number(name: str, given) -> float:
    try:
        return float(given)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name} must be a number, got {given!r}") from error


def _frames_of(name: str, frames, length: int, device: torch.device) -> torch.Tensor:
    """Frames as contiguous int32 on the device, checked where a look at them is free."""
    if not isinstance(frames, torch.Tensor):
        try:
            frames = torch.tensor(frames)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"{name} must be integers, got {frames!r}") from error
    if frames.ndim != 1 or frames.shape[0] != length:
        raise ArgumentError(f"{name} must have shape {(length,)}, got {tuple(frames.shape)}")
    if length and frames.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"{name} must be int64 or int32, got {frames.dtype}")
    if can_look_at(frames):
        low, high = (int(bound) for bound in torch.aminmax(frames))
        if low < -1 or high > _MAX_FRAME:
            raise ArgumentError(
                f"{name} must lie in [-1, {_MAX_FRAME}], got {low if low < -1 else high}"
            )
    return frames.to(device, torch.int32).contiguous()


# --- registration ----------------------------------------------------------------------------------------------------
# Besides out and lse the forward pass gives what the backward pass needs: m and its place among the keys.

torch.library.define(
    "cvg_kernels::frame_band_attention_forward",
    "(Tensor query, Tensor key, Tensor value, Tensor query_frames, Tensor key_frames, float scale, float sigma, "
    "float strength, bool row_max_grad, str backend) -> (Tensor out, Tensor lse, Tensor highest, Tensor place)",
)
torch.library.define(
    "cvg_kernels::frame_band_attention_backward",
    "(Tensor? grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor query_frames, "
    "Tensor key_frames, Tensor out, Tensor lse, Tensor highest, Tensor place, float scale, float sigma, "
    "float strength, bool row_max_grad, bool need_query, bool need_key, bool need_value, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
)

_forward_op = torch.ops.cvg_kernels.frame_band_attention_forward.default
_backward_op = torch.ops.cvg_kernels.frame_band_attention_backward.default


@torch.library.impl("cvg_kernels::frame_band_attention_forward", ("cpu", "cuda"))
def _forward(query, key, value, query_frames, key_frames, scale, sigma, strength, row_max_grad,
             backend):  # fmt: skip
    chosen, module = frame_band_attention_module(Backend(backend), query)
    note_backend("frame_band_attention", chosen.value)
    return module.forward(query, key, value, query_frames, key_frames, scale, sigma, strength)


@torch.library.register_fake("cvg_kernels::frame_band_attention_forward")
def _forward_fake(query, key, value, query_frames, key_frames, scale, sigma, strength, row_max_grad,
                  backend):  # fmt: skip
    wide, rows = torch.promote_types(query.dtype, torch.float32), query.shape[:3]
    return (
        dense_like(query, value.shape[3]),
        query.new_empty(rows, dtype=wide),
        query.new_empty(rows, dtype=wide),
        query.new_empty(rows, dtype=torch.int32),
    )


@torch.library.impl("cvg_kernels::frame_band_attention_backward", ("cpu", "cuda"))
def _backward(grad_out, grad_lse, query, key, value, query_frames, key_frames, out, lse, highest,
              place, scale, sigma, strength, row_max_grad, need_query, need_key, need_value,
              backend):  # fmt: skip
    chosen, module = frame_band_attention_module(Backend(backend), query)
    note_backend("frame_band_attention_backward", chosen.value)
    if grad_out is None and need_value:
        raise ValueError("need_value: the gradient of value flows through grad_out, which is None")
    grads = module.backward(
        grad_out, grad_lse, query, key, value, query_frames, key_frames, out, lse, highest, place,
        scale, sigma, strength, row_max_grad, need_query, need_key, need_value,
    )  # fmt: skip
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("cvg_kernels::frame_band_attention_backward")
def _backward_fake(grad_out, grad_lse, query, key, value, query_frames, key_frames, out, lse,
                   highest, place, scale, sigma, strength, row_max_grad, need_query, need_key,
                   need_value, backend):  # fmt: skip
    def like(tensor, needed):
        return dense_like(tensor) if needed else query.new_empty(0)

    return like(query, need_query), like(key, need_key), like(value, need_value)


def _remember(ctx, inputs, output) -> None:
    *tensors, scale, sigma, strength, row_max_grad, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[2:])
    ctx.options = (scale, sigma, strength, row_max_grad, backend)
    ctx.set_materialize_grads(False)  # an output without a gradient costs no work


def _differentiate(ctx, grad_out, grad_lse, grad_highest, grad_place):
    *options, backend = ctx.options
    need_query, need_key, need_value = ctx.needs_input_grad[:3]
    needed = (need_query, need_key, need_value and grad_out is not None)
    if not ((grad_out is not None or grad_lse is not None) and any(needed)):
        return (None,) * 10
    grads = _backward_op(grad_out, grad_lse, *ctx.saved_tensors, *options, *needed, backend)
    return (
        *(grad if need else None for grad, need in zip(grads, needed, strict=True)),
        *(None,) * 7,
    )


torch.library.register_autograd(
    "cvg_kernels::frame_band_attention_forward", _differentiate, setup_context=_remember
)
refuse_second_derivative("frame_band_attention")
