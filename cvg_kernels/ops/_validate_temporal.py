"""Checks of the arguments of temporal attention, and the one form that backends take its band or bias in."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops._validate import MAX_HEAD_DIM, can_look_at, check_operand
from cvg_kernels.reference.temporal_attention import gaussian_band

if TYPE_CHECKING:
    import torch._C._functorch  # which torch has loaded; checkers must be told

_MAX_FRAMES = 256
_KEPT_BANDS = 64  # of at most 256 × 256 numbers each


def check_tensors(query, key, value) -> None:
    """Checks shapes, dtypes and devices of query, key and value."""
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        layout = "[P, H, F, head_dim] or [B, P, H, F, head_dim]"
        check_operand(name, tensor, query, (4, 5), layout)
        if tensor.shape[:-1] != query.shape[:-1]:
            raise ArgumentError(
                f"{name} must have the query's positions, heads and frames {tuple(query.shape[:-1])}, got "
                f"{tuple(tensor.shape[:-1])}"
            )
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ArgumentError(f"{name} must have a head_dim of 1 to {MAX_HEAD_DIM}, got {tensor.shape[-1]}")
    if query.shape[-3] == 0:
        raise ArgumentError("query must have at least one head, got none")
    if not 1 <= query.shape[-2] <= _MAX_FRAMES:
        raise ArgumentError(f"query must have 1 to {_MAX_FRAMES} frames, got {query.shape[-2]}")
    if key.shape[-1] != query.shape[-1]:
        raise ArgumentError(f"key must have the query's head_dim {query.shape[-1]}, got {key.shape[-1]}")


def added_logits(query, sigma, strength, bias) -> torch.Tensor | None:
    """The `[F, F]` matrix to add to the logits, contiguous, in float32 (float64 for float64), or `None`.

    It is made by differentiable operations of torch: a gradient that reaches it goes on to sigma and strength, or
    bias. A band of two numbers is made once and kept: nobody may write to it.
    """
    frames, wide = query.shape[-2], torch.promote_types(query.dtype, torch.float32)
    if sigma is not None and bias is not None:
        raise ArgumentError("sigma and bias exclude each other: give the band or a bias")
    strength = _checked("strength", strength)
    if sigma is not None:
        sigma = _checked("sigma", sigma)
        if isinstance(sigma, float) and isinstance(strength, float):
            return _band_of_numbers(query, frames, sigma, strength, wide)
        return _band(frames, sigma, strength, wide, query.device)
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor) or not bias.is_floating_point():
        given = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise ArgumentError(f"bias must be a floating-point tensor [F, F] or None, got {given}")
    if bias.ndim != 2 or bias.shape[0] != frames or bias.shape[1] != frames:
        raise ArgumentError(f"bias must have shape [F, F] = {(frames, frames)}, got {tuple(bias.shape)}")
    if bias.device != query.device:
        raise ArgumentError(f"bias must be on {query.device}, got {bias.device}")
    return bias.to(wide).contiguous()


def _checked(name: str, given) -> float | torch.Tensor:
    """A number as a float, a 0-d tensor as it is; its value is checked where a look at it is free."""
    if isinstance(given, torch.Tensor):
        if given.ndim != 0 or not given.is_floating_point():
            raise ArgumentError(
                f"{name} must be a number or a 0-d floating-point tensor, got {given.dtype} {tuple(given.shape)}"
            )
        number = given.item() if can_look_at(given) else None
    else:
        try:
            given = number = float(given)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{name} must be a number or a 0-d tensor, got {given!r}") from error
    if name == "sigma" and number is not None and not number > 0:
        raise ArgumentError(f"sigma must be above 0, got {number}")
    return given


def _band(frames: int, sigma, strength, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The band strength · exp(−(i − j)² / 2σ²) of two numbers or 0-d tensors."""
    sigma, strength = (
        given.to(device, dtype)
        if isinstance(given, torch.Tensor)
        else torch.full((), given, dtype=dtype, device=device)
        for given in (sigma, strength)
    )
    return strength * gaussian_band(frames, sigma)


@lru_cache(maxsize=_KEPT_BANDS)
def _kept_band(frames, sigma, strength, dtype, device, stream) -> torch.Tensor:
    """The band of two numbers, a plain tensor also if it is first wanted under inference mode.

    One for each stream of a GPU: another stream could read it before it is written, or after it is given up.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _band(frames, sigma, strength, dtype, device)


def _band_of_numbers(query, frames: int, sigma: float, strength: float, dtype) -> torch.Tensor:
    """The band of two numbers, kept unless the call is being traced or captured:
    such a tensor belongs to its graph.
    """
    stream = None
    if torch.compiler.is_compiling() or type(query) is not torch.Tensor:
        return _band(frames, sigma, strength, dtype, query.device)
    if query.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _band(frames, sigma, strength, dtype, query.device)
        stream = torch.cuda.current_stream(query.device).cuda_stream
    band = _kept_band(frames, sigma, strength, dtype, query.device, stream)
    if type(band) is not torch.Tensor or torch._C._functorch.is_functorch_wrapped_tensor(band):
        _kept_band.cache_clear()  # made under a mode or transform of torch, which ends with this call
    return band
