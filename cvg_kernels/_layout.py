"""Where results lie in memory: as the tensors they belong to, so that no caller has to copy them into place."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def dense_like(tensor: torch.Tensor, last: int | None = None) -> torch.Tensor:
    """An empty tensor without gaps, its axes in memory ordered as those of `tensor`, the last one innermost.

    Heads that lie inside frames, `[P, F, H, D].transpose(1, 2)`, give a result that is contiguous as `[P, F, H, D]`.

    Args:
        tensor: of any strides.
        last: the size of the last axis, if it is not that of `tensor`.
    """
    leading = range(tensor.ndim - 1)
    order = [*sorted(leading, key=lambda axis: -tensor.stride(axis)), tensor.ndim - 1]
    sizes = [*tensor.shape[:-1], tensor.shape[-1] if last is None else last]
    back = sorted(range(tensor.ndim), key=order.__getitem__)
    return tensor.new_empty([sizes[axis] for axis in order]).permute(back)


def laid_out(
    grads: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], needed: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients that are needed, each as `dense_like` lays out its tensor; `None` for the others."""
    return tuple(
        dense_like(tensor).copy_(grad) if need else None
        for tensor, grad, need in zip(tensors, grads, needed, strict=True)
    )
