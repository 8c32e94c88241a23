"""What a generated call is, and how one is drawn: a number of a seed is a call, the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

#: Sizes that no tile, vector or warp divides.
_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 127, 131, 251, 257)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

LAYOUTS = ("plain", "transposed", "sliced", "expanded", "overlapping", "mixed")
VALUES = ("normal", "grid", "wide", "zeros", "tiny", "huge", "nan", "infinite")
#: What torch offers around a call; see `tests.fuzz.modes`.
MODES = ("plain", "no_grad", "inference", "autocast", "deterministic", "meta", "fake", "vmap", "func_grad", "broken")

_MODE_WEIGHTS = np.array([62, 4, 4, 4, 4, 4, 3, 3, 3, 9], dtype=float)
_LAYOUT_WEIGHTS = np.array([35, 12, 12, 12, 9, 20], dtype=float)
_VALUE_WEIGHTS = np.array([45, 14, 14, 4, 6, 7, 5, 5], dtype=float)


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


def _size(generator: np.random.Generator, bounds: Range, large: bool) -> int:
    if large and bounds.most > bounds.usual:
        primes = [prime for prime in _PRIMES if bounds.usual < prime <= bounds.most]
        return int(generator.choice(primes or [bounds.most]))
    if bounds.least == 0 and generator.random() < 0.03:
        return 0
    return int(generator.integers(max(bounds.least, 1), bounds.usual + 1))


def _one(generator: np.random.Generator, names: tuple, weights: np.ndarray | None = None):
    share = None if weights is None else weights / weights.sum()
    return names[int(generator.choice(len(names), p=share))]


def draw(seed: int, number: int, backend: str, operations: dict) -> Case:
    """Call `number` of a seed.

    Args:
        seed: of the run.
        number: of the call, from 0.
        backend: that calls are made of.
        operations: `OPERATIONS`, of which those are drawn that have the backend.
    """
    generator = np.random.default_rng([seed, number])
    names = tuple(name for name, operation in operations.items() if backend in operation.backends)
    name = _one(generator, names)
    operation = operations[name]
    # One size in most calls is large, and in every third none is: work is their product.
    large = int(generator.integers(0, max(2, 2 * len(operation.sizes))))
    slow = backend.startswith("triton")
    sizes = {}
    for place, (size, bounds) in enumerate(operation.sizes.items()):
        if slow:
            bounds = Range(bounds.least, min(bounds.usual, 6), min(bounds.most, 70))
        sizes[size] = _size(generator, bounds, place == large)
    options = {
        option: choices[0] if generator.random() < 0.4 else _one(generator, choices)
        for option, choices in operation.options.items()
    }
    dtypes = operation.dtypes
    if slow:
        dtypes = tuple(dtype for dtype in dtypes if dtype != "float64") + ("float32",)
    return Case(
        name,
        backend,
        _one(generator, dtypes),
        _one(generator, MODES, _MODE_WEIGHTS),
        _one(generator, LAYOUTS, _LAYOUT_WEIGHTS),
        _one(generator, VALUES, _VALUE_WEIGHTS),
        int(generator.choice([1, 1, 2, 3, 4])),
        sizes,
        options,
        int(generator.integers(2**31)),
    )
