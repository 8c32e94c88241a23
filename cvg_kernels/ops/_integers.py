"""Integers that a caller gives as a tensor or as a list: token ids, frames.

A list is copied to its device once and kept: a copy in every call would wait for a GPU, and none may happen while a
CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops._validate import can_look_at, is_real


class Integers(NamedTuple):
    """Integers on a device, and the smallest and largest of them where a look at them is free."""

    tensor: torch.Tensor
    bounds: tuple[int, int] | None


def normalize_integers(name: str, given: torch.Tensor | Sequence, device_of: torch.Tensor, shape: str) -> Integers:
    """The integers of an argument.

    Args:
        name: name of the argument, for messages.
        given: a tensor, returned as it is, or integers in lists.
        device_of: a tensor of the call, on whose device a list is put.
        shape: what is accepted, for messages.

    Raises:
        ArgumentError: for what is no list of integers, or a tensor without numbers.
    """
    if isinstance(given, torch.Tensor):
        if given.device.type == "meta" and device_of.device.type != "meta":
            raise ArgumentError(f"{name} must hold numbers, got a tensor on the meta device")
        return Integers(given, _bounds(given))
    try:
        numbers = None if torch.compiler.is_compiling() else _frozen(given)
        if numbers is not None and is_real(device_of):
            return _kept(numbers, device_of.device)
        listed = torch.tensor(given)
        return Integers(listed, _bounds(listed))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} must be integers, {shape}, got {given!r}") from error


@lru_cache(256)
def _kept(numbers: tuple, device: torch.device) -> Integers:
    # In inference mode the tensor could not be saved for the backward pass of a later call outside of it.
    with torch.inference_mode(False):
        listed = torch.tensor(numbers)
        return Integers(listed.to(device), _bounds(listed))


def _frozen(given: Any) -> tuple | None:
    """Lists of integers as tuples; `None` for anything else: `True` and `1.0` would be found in the cache as 1."""
    if not isinstance(given, (list, tuple, range)):
        return None
    frozen = tuple(one if type(one) is int else _frozen(one) for one in given)
    return None if None in frozen else frozen


def _bounds(tensor: torch.Tensor) -> tuple[int, int] | None:
    if not can_look_at(tensor) or tensor.dtype not in (torch.int64, torch.int32):  # those that are accepted
        return None
    low, high = torch.aminmax(tensor)
    return int(low), int(high)
