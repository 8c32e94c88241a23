"""Attention with a band by frame distance: the public function and its checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cvg_kernels.backends import Backend, parse_backend
from cvg_kernels.errors import ArgumentError, check_flag
from cvg_kernels.ops import _attention_op as operation
from cvg_kernels.ops import _attention_reference as reference
from cvg_kernels.ops._attention_call import AttentionCall, Band
from cvg_kernels.ops._autocast import cast_inputs
from cvg_kernels.ops._integers import normalize_integers
from cvg_kernels.ops._registration import backend_on
from cvg_kernels.ops._trace import note_backend
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate import check_tensors, normalize_scale
from cvg_kernels.ops._validate_given import normalize_number

#: The largest frame number: distances are exact in float32.
_MAX_FRAME = 2**24 - 1
#: A narrower band is this one: exp(−1 / 2σ²) is 0 in float64 already.
_NARROWEST = 0.01


class FrameBand(NamedTuple):
    """A band by the distance of frames: strength · m · exp(−(f_i − f_j)² / 2σ²) is added to the logits.

    See `frame_band_attention` for what the fields mean.

    Attributes:
        query_frames: the frame of each query, `[N]`, −1 for a token of no frame.
        key_frames: the frame of each key, `[M]`.
        sigma: width in frames, above 0.
        strength: factor of the band.
        row_max_grad: whether a gradient flows through m.

    Examples:
        >>> query, key, value = torch.randn(3, 1, 8, 24, 32)
        >>> frames = torch.arange(4).repeat_interleave(6)  # 4 frames of 6 tokens
        >>> band = cvg.FrameBand(frames, frames, sigma=1.5)
        >>> cvg.attention_with_capture(query, key, value, [0, 6], band=band).maps.shape
        torch.Size([1, 2, 24])
    """

    query_frames: torch.Tensor | Sequence[int]
    key_frames: torch.Tensor | Sequence[int]
    sigma: float
    strength: float = 1.0
    row_max_grad: bool = True


class FrameBandAttention(NamedTuple):
    """What `frame_band_attention` returns.

    Attributes:
        out: `[B, H, N, Dv]`, the dtype of the query.
        lse: `[B, H, N]`, float32, natural logarithm.
    """

    out: torch.Tensor
    lse: torch.Tensor


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
    flash attention with the band added. Differentiable in query, key and value through `out` and `lse`. The gradient
    is the true one: it also flows through m, to the first of the keys that tie for the maximum. The kernels give first
    derivatives; `backend="reference"` is differentiable twice. Under autocast the inputs are cast as those of torch's
    own attention are.

    Args:
        query: `[B, H, N, D]`, float32, bfloat16, float16 or float64 (float64: CPU kernels and reference only), with
            any strides; `[B, N, H, D].transpose(1, 2)` costs no copy.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        query_frames: the frame of each query, integers `[N]` from 0; −1 marks a token of no frame (a text token of
            joint attention), which neither gives nor gets a band. On a GPU a tensor of frames is trusted, since a look
            at it would wait for the device; on the CPU, and as a list, it is checked.
        key_frames: the frame of each key, `[M]`.
        sigma: width of the band in frames, a number above 0; smaller is stronger.
        strength: factor of the band, finite. Where m is negative the band lowers the logits of near frames.
        scale: factor of the logits; `None` is `D ** -0.5`.
        row_max_grad: `False` takes m as a constant in the backward pass.
        backend: `"auto"`, or the name of one, which then never falls back: `"reference"`, `"native"` (C++, CPU
            tensors) or `"triton"` (GPU tensors).

    Returns:
        `FrameBandAttention(out, lse)`: out lies in memory as the query does.

    Raises:
        ArgumentError: if an argument does not fit; names it, what was given and what is accepted.
        BackendUnavailableError: if the named backend cannot run here; names the reason and the way to get it.

    An extension to networks without temporal layers of "VSTAR: Generative Temporal Nursing for Longer Dynamic Video
    Synthesis", which regularises temporal attention only.

    Examples:
        >>> query, key, value = torch.randn(3, 1, 8, 24, 32)
        >>> frames = torch.arange(4).repeat_interleave(6)  # 4 frames of 6 tokens
        >>> cvg.frame_band_attention(query, key, value, frames, frames, sigma=1.5).out.shape
        torch.Size([1, 8, 24, 32])
    """
    query, key, value = cast_inputs(query, key, value)
    check_tensors(query, key, value, values=True)
    scale = normalize_scale(scale, query)
    band = FrameBand(query_frames, key_frames, sigma, strength, row_max_grad)
    band = checked_band(band, query, key)
    backend = backend_under_transforms("frame_band_attention", backend, (query, key, value))
    backend = backend_on("frame_band_attention", backend, query.device)
    call = AttentionCall(query, key, value, None, None, None, band, scale, True)
    if backend is Backend.REFERENCE:
        note_backend("frame_band_attention", "reference")
        found = reference.attend(call)
    else:
        found = operation.attend(call, True, backend)
    assert found.out is not None  # of the values
    return FrameBandAttention(found.out, found.lse)


def first_highest_keys(
    query: torch.Tensor, key: torch.Tensor, *, scale: float, backend: str | Backend = "auto"
) -> torch.Tensor:
    """Returns the first key that reaches the largest logit of each query, int64 `[B, H, N]`, without the N×M matrix.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        scale: factor of the logits.
        backend: as for `frame_band_attention`, whose first pass finds it.

    Raises:
        ArgumentError: if an argument does not fit.
        BackendUnavailableError: if the named backend cannot run here.

    Examples:
        >>> from cvg_kernels.ops import first_highest_keys
        >>> query, key = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 1.0, 1.0]).view(1, 1, 3, 1)
        >>> first_highest_keys(query, key, scale=1.0)
        tensor([[[1, 1]]])
    """
    check_tensors(query, key, None, values=False)
    scale = normalize_scale(scale, query)
    query, key, _ = cast_inputs(query.detach(), key.detach(), None)
    no_frames, none = (
        torch.full((n,), -1, dtype=torch.int32, device=query.device) for n in (query.shape[2], key.shape[2])
    )
    call = AttentionCall(query, key, None, None, None, None, Band(no_frames, none, 1.0, 0.0, False), scale, True)
    with torch.no_grad():
        row_argmax = operation.attend(call, True, parse_backend(backend)).row_argmax
    assert row_argmax is not None  # of the band
    return row_argmax.long()


def checked_band(band: FrameBand, query: torch.Tensor, key: torch.Tensor) -> Band:
    """A band as the backends take it.

    Raises:
        ArgumentError: if one of its fields does not fit.
    """
    if not isinstance(band, FrameBand):
        raise ArgumentError(f"band must be a FrameBand or None, got {type(band).__name__}")
    sigma, strength = normalize_number("sigma", band.sigma), normalize_number("strength", band.strength)
    if not sigma > 0:
        raise ArgumentError(f"sigma must be above 0, got {sigma}")
    if not math.isfinite(strength):
        raise ArgumentError(f"strength must be finite, got {strength}")
    check_flag("row_max_grad", band.row_max_grad)
    return Band(
        _normalize_frames("query_frames", band.query_frames, query.shape[2], query),
        _normalize_frames("key_frames", band.key_frames, key.shape[2], query),
        max(sigma, _NARROWEST),
        strength,
        band.row_max_grad,
    )


def _normalize_frames(name: str, frames, length: int, query: torch.Tensor) -> torch.Tensor:
    """Frames as contiguous int32 on the query's device, checked where a look at them is free."""
    frames, bounds = normalize_integers(name, frames, query, "one per token")
    if frames.ndim != 1 or frames.shape[0] != length:
        raise ArgumentError(f"{name} must have shape {(length,)}, got {tuple(frames.shape)}")
    if length and frames.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"{name} must be int64 or int32, got {frames.dtype}")
    if bounds is not None and (bounds[0] < -1 or bounds[1] > _MAX_FRAME):
        outside = bounds[0] if bounds[0] < -1 else bounds[1]
        raise ArgumentError(f"{name} must lie in [-1, {_MAX_FRAME}], got {outside}")
    return frames.to(query.device, torch.int32).contiguous()
