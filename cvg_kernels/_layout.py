"""Where results lie in memory: as the tensors they belong to, so that no caller has to copy them into place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch


def dense_like(tensor: torch.Tensor, last: int | None = None) -> torch.Tensor:
    """An empty tensor without gaps, its axes in memory ordered as those of `tensor`, the last one innermost.

    Heads that lie inside frames, `[P, F, H, D].transpose(1, 2)`, give a result that is contiguous as `[P, F, H, D]`.

    Args:
        tensor: tensor of any strides.
        last: the size of the last axis, if it is not that of `tensor`.
    """
    sizes = [*tensor.shape[:-1], tensor.shape[-1] if last is None else last]
    strides, size = [1] * len(sizes), 1
    for axis in reversed(_order(tensor)):
        strides[axis] = size
        size *= max(sizes[axis], 1)
    # Not a view of another tensor, which autograd would let nobody write into.
    return tensor.new_empty_strided(sizes, strides)


def lies_like(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether a tensor of the leading sizes of `like` lies in memory as `dense_like` would put it."""
    size = 1
    for axis in reversed(_order(like)):
        if tensor.stride(axis) != size and tensor.shape[axis] != 1:
            return False
        size *= tensor.shape[axis]
    return True


def copied_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor in memory as `dense_like(like)`, by operations that can be differentiated."""
    order = _order(like)
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


def _order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The axes of a tensor as they lie in memory, outermost first and the last one innermost."""
    strides = tensor.stride()
    symbols = any(type(stride) is not int for stride in strides)  # of a compiler; they have no hash
    return _sorted(strides) if symbols else _sorted_before(strides)


def _sorted(strides: tuple[int, ...]) -> tuple[int, ...]:
    last = len(strides) - 1
    return (*sorted(range(last), key=lambda axis: -strides[axis]), last)


_sorted_before = lru_cache(4096)(_sorted)


def with_layout_of(
    grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], needed: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients that are needed, each as `dense_like` lays out its tensor; `None` for the others."""
    return tuple(
        dense_like(tensor).copy_(grad) if need else None
        for tensor, grad, need in zip(tensors, grads, needed, strict=True)
    )
