"""What a generated call is, and how one is drawn: a number of a seed is a call, the same on every machine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch

#: Sizes that no tile, vector or warp divides.
_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 127, 131, 251, 257)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

LAYOUTS = ("plain", "transposed", "sliced", "expanded", "overlapping", "mixed")
VALUES = ("normal", "grid", "wide", "zeros", "tiny", "huge", "nan", "infinite")
#: What torch offers around a call; see `tests.fuzz.modes`.
MODES = ("plain", "no_grad", "inference", "autocast", "deterministic", "meta", "fake", "vmap", "func_grad", "broken")

# The sums of the weights up to each.
_MODE_WEIGHTS = list(accumulate([64, 4, 4, 4, 4, 4, 1, 3, 3, 9]))
_LAYOUT_WEIGHTS = list(accumulate([35, 12, 12, 12, 9, 20]))
_VALUE_WEIGHTS = list(accumulate([45, 14, 14, 4, 6, 7, 5, 5]))


@dataclass(frozen=True)
class Case:
    """A call. Everything but the numbers in its tensors stands here; those follow from `seed`.

    Attributes:
        operation: a key of `OPERATIONS`.
        backend: that is asked for.
        dtype: a key of `DTYPES`.
        mode: one of `MODES`.
        layout: of `LAYOUTS`: how tensors lie in memory; mixed draws one for each.
        values: of `VALUES`: what numbers they hold.
        threads: of torch.
        sizes: the operation's own.
        options: the operation's own, by name.
        seed: of the numbers, of which inputs want a gradient, and of what is drawn from it.
    """

    operation: str
    backend: str
    dtype: str = "float32"
    mode: str = "plain"
    layout: str = "plain"
    values: str = "normal"
    threads: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def code(self) -> str:
        """The program that makes this call and judges it."""
        lines = [
            "from tests.fuzz.cases import Case",
            "from tests.fuzz.oracle import examine",
            "",
            f"examine({self!r})",
        ]
        return "\n".join(lines)

    def changed(self, **changes: Any) -> Case:
        """This case with some of its fields, sizes or options as given."""
        sizes = {name: changes.pop(name, value) for name, value in self.sizes.items()}
        options = {name: changes.pop(name, value) for name, value in self.options.items()}
        return replace(self, sizes=sizes, options=options, **changes)


@dataclass(frozen=True)
class Range:
    """A size of an operation: at least, usually at most, and at most at all."""

    least: int = 1
    usual: int = 9
    most: int = 60


def _size(numbers: random.Random, bounds: Range, large: bool) -> int:
    if large and bounds.most > bounds.usual:
        primes = [prime for prime in _PRIMES if bounds.usual < prime <= bounds.most]
        return numbers.choice(primes or [bounds.most])
    if bounds.least == 0 and numbers.random() < 0.03:
        return 0
    return numbers.randint(max(bounds.least, 1), bounds.usual)


def _one(numbers: random.Random, names: tuple, weights: list[int] | None = None):
    return numbers.choices(names, cum_weights=weights)[0]


def draw(seed: int, number: int, backend: str, operations: dict) -> Case:
    """Call `number` of a seed.

    Args:
        seed: of the run.
        number: of the call, from 0.
        backend: that calls are made of.
        operations: `OPERATIONS`, of which those are drawn that have the backend.
    """
    numbers = random.Random((seed << 40) + number)
    names = tuple(name for name, operation in operations.items() if backend in operation.backends)
    name = _one(numbers, names)
    operation = operations[name]
    # One size in every third call is large, and in the others none is: work is their product.
    large = numbers.randrange(3 * len(operation.sizes))
    slow = backend.startswith("triton")
    sizes = {}
    for place, (size, bounds) in enumerate(operation.sizes.items()):
        if slow:
            bounds = Range(bounds.least, min(bounds.usual, 6), min(bounds.most, 70))
        sizes[size] = _size(numbers, bounds, place == large)
    options = {
        option: choices[0] if numbers.random() < 0.4 else _one(numbers, choices)
        for option, choices in operation.options.items()
    }
    dtypes = operation.dtypes
    if slow:
        dtypes = tuple(dtype for dtype in dtypes if dtype != "float64") + ("float32",)
    return Case(
        name,
        backend,
        _one(numbers, dtypes),
        _one(numbers, MODES, _MODE_WEIGHTS),
        _one(numbers, LAYOUTS, _LAYOUT_WEIGHTS),
        _one(numbers, VALUES, _VALUE_WEIGHTS),
        numbers.choice((1, 1, 2, 3, 4)),
        sizes,
        options,
        numbers.randrange(2**31),
    )
