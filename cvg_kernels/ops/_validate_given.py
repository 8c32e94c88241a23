"""Checks of single arguments that several operations share:
numbers, and tensors that are no queries, keys or values.
"""

from __future__ import annotations

from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops._validate import DTYPES


def normalize_number(name: str, given: Any, wanted: str = "a number") -> float:
    """An argument that is a number, as a float.

    Args:
        name: name of the argument, for the message.
        given: a number, or a tensor with one.
        wanted: what is accepted, for the message.

    Raises:
        ArgumentError: if it is none.
    """
    try:
        if isinstance(given, (str, bytes)):
            raise TypeError
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} must be {wanted}, got {described(given)}") from error


def check_floating(name: str, given: Any, layout: str, dimensions: int) -> None:
    """Checks that an argument is a tensor of a floating point type that is computed in, with so many axes.

    Args:
        name: name of the argument, for the message.
        given: that is to be a tensor.
        layout: its axes, for the message.
        dimensions: how many those are.

    Raises:
        ArgumentError: if it is none.
    """
    fits = isinstance(given, torch.Tensor) and given.layout is torch.strided
    if not fits or given.ndim != dimensions or given.dtype not in DTYPES:
        raise ArgumentError(f"{name} must be floating point {layout}, got {described(given)}")


def normalize_tensors(name: str, given: Any) -> list[torch.Tensor]:
    """An argument that is several tensors, as a list: what can be read only once is read here.

    Args:
        name: name of the argument, for the message.
        given: tensors in any sequence.

    Raises:
        ArgumentError: if it is no sequence, or something in it is no tensor.
    """
    try:
        found = list(given)
    except TypeError as error:
        raise ArgumentError(f"{name} must be a sequence of tensors, got {described(given)}") from error
    for number, one in enumerate(found):
        if not isinstance(one, torch.Tensor):
            raise ArgumentError(f"{name}[{number}] must be a tensor, got {described(one)}")
    return found


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be read: one on the meta device, and a fake one, has a shape and no numbers."""
    return tensor.device.type != "meta" and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def described(given: Any) -> str:
    """What was given, for a message: a tensor's type and shape, a short value as it is, anything else by its type."""
    if isinstance(given, torch.Tensor):
        kind = "" if given.layout is torch.strided else " sparse"
        return f"{given.dtype}{kind} {tuple(given.shape)}"
    plain = given is None or isinstance(given, (bool, int, float, str))
    return repr(given) if plain else type(given).__name__
