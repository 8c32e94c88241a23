"""A call with its arguments made, and what is done with the tensors among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from tests.fuzz.cases import Case, Range
from tests.fuzz.tensors import Maker


class Call(NamedTuple):
    """A public function and its arguments, all but the backend."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    leaves: tuple[str, ...] = ()  #: the tensors that may want a gradient, named as `tensors_of` does
    depth: int = 32  #: terms of the longest sum
    refusal: str | None = None  #: what an ArgumentError may say of this call (a pattern)


class Operation(NamedTuple):
    """A public operation."""

    build: Callable[[Case, Maker], Call]
    sizes: dict[str, Range]
    options: dict[str, tuple]  #: the simplest choice first
    dtypes: tuple[str, ...]
    backends: tuple[str, ...] = ("native", "triton", "reference")
    casts: bool = False  #: whether autocast casts its inputs


def tensors_of(arguments: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among arguments, by name: `query`, `temporal[0]`."""
    if isinstance(arguments, torch.Tensor):
        yield name, arguments
    elif isinstance(arguments, dict):
        for key, value in arguments.items():
            yield from tensors_of(value, key)
    elif isinstance(arguments, (list, tuple)):
        for number, value in enumerate(arguments):
            yield from tensors_of(value, f"{name}[{number}]")


def with_tensors(arguments: Any, change: Callable[[str, torch.Tensor], Any], name: str = "") -> Any:
    """The arguments with every tensor replaced by what `change` makes of its name and itself."""
    if isinstance(arguments, torch.Tensor):
        return change(name, arguments)
    if isinstance(arguments, dict):
        return {key: with_tensors(value, change, key) for key, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        changed = [with_tensors(v, change, f"{name}[{n}]") for n, v in enumerate(arguments)]
        kind = type(arguments)
        return kind(*changed) if hasattr(kind, "_fields") else kind(changed)
    return arguments


def results_of(found: Any) -> dict[str, torch.Tensor]:
    """What a function returned, by name."""
    if isinstance(found, torch.Tensor):
        return {"result": found}
    named = zip(found._fields, found, strict=True)
    return {name: tensor for name, tensor in named if tensor is not None}
