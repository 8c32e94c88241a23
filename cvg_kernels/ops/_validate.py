"""Checks of the arguments of attention with capture, and the one form that backends take them in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from cvg_kernels.errors import ArgumentError

if TYPE_CHECKING:
    import torch._C._functorch  # which torch has loaded; checkers must be told

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 256


class Mask(NamedTuple):
    """A mask in additive form, shifted along the keys so that the largest entry of a row is 0.

    The shift leaves probabilities as they are and keeps their float32 logits small: masks of −10⁴ or of the lowest
    float on every key would else drown the scores.
    """

    values: torch.Tensor  #: `[B, 1, 1, M]`; broadcasts to `[B, H, N, M]` where `dense`
    shift: torch.Tensor | None  #: broadcasts to `[B, H, N]`, to be added to the log-sum-exp
    dense: bool  #: depends on the query or the head


def check_operand(name: str, tensor, query, ranks: tuple[int, ...], layout: str) -> None:
    """Checks that one of query, key and value is a tensor of a served dtype, with the axes, dtype and device asked
    for.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.ndim not in ranks:
        given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ArgumentError(f"{name} must be a tensor {layout}, got {given}")
    if tensor.dtype not in DTYPES:
        raise ArgumentError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if (tensor.dtype, tensor.device) != (query.dtype, query.device):
        raise ArgumentError(
            f"{name} must have the query's dtype and device ({query.dtype}, {query.device}), "
            f"got {tensor.dtype}, {tensor.device}"
        )


def check_tensors(query, key, value, *, values: bool) -> None:
    """Checks shapes, dtypes and devices of query, key and, where the operation has them, values."""
    if not torch.compiler.is_compiling() and _fit(query, key, value if values else key):
        return
    tensors = {"query": query, "key": key, **({"value": value} if values else {})}
    for name, tensor in tensors.items():
        check_operand(name, tensor, query, (4,), "[B, H, length, head_dim]")
        if tensor.shape[0] != query.shape[0] or tensor.shape[1] != query.shape[1]:
            raise ArgumentError(
                f"{name} must have the query's batch and heads {tuple(query.shape[:2])}, got {tuple(tensor.shape[:2])}"
            )
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            raise ArgumentError(f"{name} must have a head_dim of 1 to {MAX_HEAD_DIM}, got {tensor.shape[3]}")
    if query.shape[1] == 0:
        raise ArgumentError("query must have at least one head, got none")
    if key.shape[2] == 0:
        raise ArgumentError("key must hold at least one key, got none")
    if key.shape[3] != query.shape[3]:
        raise ArgumentError(f"key must have the query's head_dim {query.shape[3]}, got {key.shape[3]}")
    if values and value.shape[2] != key.shape[2]:
        raise ArgumentError(f"value must have the key's length {key.shape[2]}, got {value.shape[2]}")


def _fit(query, key, value) -> bool:
    """What `check_tensors` asks for, in one look that costs little."""
    tensors = (query, key, value)
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return False
    if not query.ndim == key.ndim == value.ndim == 4 or query.dtype not in DTYPES:
        return False
    if not (query.dtype == key.dtype == value.dtype and query.device == key.device == value.device):
        return False
    (batch, heads, _, dim), (b, h, keys, key_dim), (c, g, length, value_dim) = (tensor.shape for tensor in tensors)
    return (
        b == c == batch
        and g == h == heads >= 1
        and length == keys >= 1
        and 1 <= key_dim == dim <= MAX_HEAD_DIM
        and 1 <= value_dim <= MAX_HEAD_DIM
    )


def is_real(tensor: torch.Tensor) -> bool:
    """Whether it holds numbers: a fake tensor is of a class of its own."""
    real = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return real and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def can_look_at(tensor: torch.Tensor) -> bool:
    """Whether its numbers can be read at no cost:
    not on a GPU, in a compiled graph, of a fake tensor or under vmap.
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or tensor.numel() == 0:
        return False
    return is_real(tensor)


def normalize_scale(scale: float | None, query: torch.Tensor) -> float:
    """The factor of the logits, D ** -0.5 if none is given."""
    if scale is None:
        return query.shape[-1] ** -0.5
    number = not isinstance(scale, (str, bytes))
    try:
        number = number and not math.isnan(found := float(scale))
    except (TypeError, ValueError, RuntimeError):
        number = False
    if not number:
        raise ArgumentError(f"scale must be a number or None, got {scale!r}")
    if isinstance(scale, torch.Tensor) and scale.requires_grad:
        raise ArgumentError("scale must not require a gradient: multiply the query by it instead")
    return found


def normalize_mask(key_mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> Mask | None:
    """The mask in additive form, checked; `None` if there is none."""
    if key_mask is None:
        return None
    if not isinstance(key_mask, torch.Tensor):
        raise ArgumentError(f"key_mask must be a tensor or None, got {type(key_mask).__name__}")
    if key_mask.dtype != torch.bool and not key_mask.is_floating_point():
        raise ArgumentError(f"key_mask must be bool or floating point, got {key_mask.dtype}")
    if key_mask.ndim == 2 and key_mask.dtype != torch.bool:
        raise ArgumentError(
            f"key_mask must be bool where it has two dimensions, [B, M], got {key_mask.dtype}; an additive "
            "one is [B, 1, 1, M]"
        )
    if key_mask.device != query.device:
        raise ArgumentError(f"key_mask must be on {query.device}, got {key_mask.device}")
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    full = (batch, heads, queries, keys)
    mask = key_mask[:, None, None] if key_mask.ndim == 2 else key_mask
    # Compared one by one: `in` on a tuple does not see that a symbolic size equals a number.
    if mask.ndim != 4 or any(have != 1 and have != want for have, want in zip(mask.shape, full, strict=True)):
        raise ArgumentError(
            f"key_mask must be bool [B, M] = {(batch, keys)}, additive [B, 1, 1, M], or (reference only) broadcast "
            f"to {full}; got {tuple(key_mask.shape)}"
        )
    wide = torch.promote_types(query.dtype, torch.float32)
    dense = mask.shape[1] != 1 or mask.shape[2] != 1
    if mask.dtype == torch.bool:
        values, shift = torch.where(mask, 0.0, -torch.inf).to(wide), None
    else:
        values = mask.to(wide)
        # Not −∞ where no key is seen: −∞ − (−∞) would be no number.
        shift = values.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
        values, shift = values - shift, shift[..., 0]
    return Mask(values if dense else values.expand(batch, 1, 1, keys), shift, dense)
