"""Memory that kernels write, watched: poisoned, so that a number that was not written shows, or between guards as
well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_FUNCTIONS = ("empty", "empty_like", "empty_strided", "empty_permuted")
_METHODS = ("new_empty", "new_empty_strided")

#: Every constructor of torch that leaves memory as it is, as (whose, name).
ALLOCATORS = [(torch, name) for name in _FUNCTIONS] + [(torch.Tensor, name) for name in _METHODS]

_GUARD = 256  # bytes at either end
_POISON = 0xFF  # NaN in every floating point type, no bool, −1
_UNTOUCHED = bytes([_POISON]) * _GUARD


def watched(allocate: Callable, prepare: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """A constructor whose tensors pass through `prepare` when the package calls it."""

    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        real = type(tensor) is torch.Tensor and tensor.device.type != "meta"
        if real and caller == "cvg_kernels":
            with torch.no_grad():
                return prepare(tensor)
        return tensor

    return wrapper


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor filled with NaN, or the largest integer."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(torch.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


class Guards:
    """Tensors that lie in larger memory, all of it poisoned."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # whole memory, tensor in it

    def between(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same sizes and strides between two guards."""
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.device.type != "cpu":
            return poisoned(tensor)
        size, stride = tensor.size(), tensor.stride()
        steps = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = 1 + steps if tensor.numel() else 0
        whole = torch.full((2 * _GUARD + count * tensor.itemsize,), _POISON, dtype=torch.uint8)
        inside = torch.tensor([], dtype=tensor.dtype)
        inside.set_(whole.untyped_storage(), _GUARD // tensor.itemsize, size, stride)
        self._kept.append((whole, inside))
        return inside

    def touched(self, whole_results: bool = True) -> str | None:
        """What was written outside of a tensor since the last look, or a bool that was not written; or `None`.

        Args:
            whole_results: whether bools must be; a call that is refused may leave them.
        """
        kept, self._kept = self._kept, []
        for whole, inside in kept:
            for name, guard in (("before", whole[:_GUARD]), ("behind", whole[-_GUARD:])):
                if guard.numpy().tobytes() != _UNTOUCHED:
                    return f"memory {name} a {inside.dtype} tensor of {tuple(inside.shape)} was written"
            left = inside.dtype == torch.bool and whole_results
            if left and bool((whole[_GUARD:-_GUARD] > 1).any()):
                return f"a bool tensor of {tuple(inside.shape)} was not written throughout"
        return None


@contextmanager
def guarded() -> Iterator[Guards]:
    """What the package allocates inside lies between guards."""
    guards = Guards()
    before = [(owner, name, getattr(owner, name)) for owner, name in ALLOCATORS]
    for owner, name, allocate in before:
        setattr(owner, name, watched(allocate, guards.between))
    try:
        yield guards
    finally:
        for owner, name, allocate in before:
            setattr(owner, name, allocate)
