"""Checks of the arguments of temporal attention, and the one form that backends take its band or bias in."""

from __future__ import annotations

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops._validate import MAX_HEAD_DIM, can_look_at, check_operand
from python_ref.temporal_attention import gaussian_band

_MAX_FRAMES = 256


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
            raise ArgumentError(
                f"{name} must have a head_dim of 1 to {MAX_HEAD_DIM}, got {tensor.shape[-1]}"
            )
    if query.shape[-3] == 0:
        raise ArgumentError("query must have at least one head, got none")
    if not 1 <= query.shape[-2] <= _MAX_FRAMES:
        raise ArgumentError(f"query must have 1 to {_MAX_FRAMES} frames, got {query.shape[-2]}")
    if key.shape[-1] != query.shape[-1]:
        raise ArgumentError(
            f"key must have the query's head_dim {query.shape[-1]}, got {key.shape[-1]}"
        )


def added_logits(query, sigma, strength, bias) -> torch.Tensor | None:
    """The `[F, F]` matrix to add to the logits, contiguous, in float32 (float64 for float64), or `None`.

    It is made by differentiable operations of torch: a gradient that reaches it goes on to sigma and strength, or bias.
    """
    frames, wide = query.shape[-2], torch.promote_types(query.dtype, torch.float32)
    if sigma is not None:
        if bias is not None:
            raise ArgumentError("sigma and bias exclude each other: give the band or a bias")
        sigma = _scalar("sigma", sigma, query.device, wide)
        strength = _scalar("strength", strength, query.device, wide)
        return strength * gaussian_band(frames, sigma)
    _scalar("strength", strength, query.device, wide)
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor) or not bias.is_floating_point():
        given = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise ArgumentError(f"bias must be a floating-point tensor [F, F] or None, got {given}")
    if bias.ndim != 2 or bias.shape[0] != frames or bias.shape[1] != frames:
        raise ArgumentError(
            f"bias must have shape [F, F] = {(frames, frames)}, got {tuple(bias.shape)}"
        )
    if bias.device != query.device:
        raise ArgumentError(f"bias must be on {query.device}, got {bias.device}")
    return bias.to(wide).contiguous()


def _scalar(name: str, given, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A number or a 0-d tensor as a 0-d tensor; checked where a look at it is free."""
    if isinstance(given, torch.Tensor):
        if given.ndim != 0 or not given.is_floating_point():
            raise ArgumentError(
                f"{name} must be a number or a 0-d floating-point tensor, got {given.dtype} {tuple(given.shape)}"
            )
        number = given.item() if can_look_at(given) else None
        scalar = given.to(device, dtype)
    else:
        try:
            number = float(given)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"{name} must be a number or a 0-d tensor, got {given!r}"
            ) from error
        scalar = torch.full((), number, dtype=dtype, device=device)
    if name == "sigma" and number is not None and not number > 0:
        raise ArgumentError(f"sigma must be above 0, got {number}")
    return scalar
