"""Tensors of generated calls: how they lie in memory and what numbers they hold, in the midst of NaN."""

from __future__ import annotations

import random

import torch

from tests.fuzz.cases import DTYPES, LAYOUTS, Case

_AROUND = 37  # numbers before and behind what a tensor may read; no multiple of a vector


class Maker:
    """Makes the tensors of a case, the same ones each time."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = DTYPES[case.dtype]
        self.generator = torch.Generator().manual_seed(case.seed)
        self.random = random.Random(case.seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers in float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Numbers of any sign, as the case asks for."""
        return self._laid(self._numbers(shape), dtype or self.dtype)

    def capacities(self, *shape: int) -> torch.Tensor:
        """Numbers from 0, as maps have them; NaN and infinity where the case asks for them."""
        numbers = self._numbers(shape).abs()
        return self._laid(numbers / 4 if self.case.values in ("normal", "grid") else numbers, self.dtype)

    def ordinary(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Standard normal numbers whatever the case asks for."""
        return self._laid(self.normal(*shape), dtype or self.dtype)

    def flags(self, *shape: int, share: float = 0.6) -> torch.Tensor:
        """bool, `share` of them true."""
        return self._laid(torch.rand(shape, generator=self.generator) < share, torch.bool)

    def _numbers(self, shape: tuple[int, ...]) -> torch.Tensor:
        numbers, values = self.normal(*shape), self.case.values
        if values == "grid":
            return (2 * numbers).round().clamp(-4, 4) / 2
        if values == "wide":
            return numbers * 10 ** (3 * self.random.random() - 2)
        if values == "zeros":
            return torch.where(numbers > 0, 0.0, -0.0)
        if values == "tiny":
            return numbers * (1e-40 if self.dtype.itemsize > 2 else 1e-7)
        some = torch.rand(shape, generator=self.generator) < 0.1
        if values == "huge":
            return torch.where(some, numbers * (1e30 if self.dtype != torch.float16 else 3e4), numbers)
        if values == "nan":
            return torch.where(some, torch.nan, numbers)
        if values == "infinite":
            return torch.where(some, numbers.sign() * torch.inf, numbers)
        return numbers

    def _laid(self, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The numbers in the case's layout; where places share memory, they share a number."""
        layout, numbers = self.case.layout, numbers.to(dtype)
        if layout == "mixed":
            layout = self.random.choice(LAYOUTS[:-1])
        shape, rank = list(numbers.shape), numbers.ndim
        if numbers.numel() == 0 or rank == 0:
            return numbers
        order = list(range(rank))
        steps = [1] * rank  # between neighbours, in units of what lies inside of them
        if layout == "transposed":
            self.random.shuffle(order)
        elif layout == "sliced":
            steps = [self.random.choice((1, 2, 3)) for _ in order]
        strides, stride = [0] * rank, 1
        for axis in reversed(order):
            strides[axis] = stride * steps[axis]
            stride *= shape[axis] * steps[axis]
        if layout == "expanded":
            axis = self.random.choice(order)
            strides[axis] = 0
        elif layout == "overlapping":
            axis = self.random.choice(order)
            strides[axis] = max(1, strides[axis] // 2)
        length = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        before = _AROUND + self.random.randrange(4)
        memory = torch.zeros(before + length + _AROUND, dtype=dtype)
        if dtype.is_floating_point:
            memory.fill_(torch.nan)
        view = memory.as_strided(shape, strides, before)
        if layout not in ("expanded", "overlapping"):
            return view.copy_(numbers)
        # The last of those that share a place is what both read.
        places = torch.arange(len(memory)).as_strided(shape, strides, before).reshape(-1)
        memory[places] = numbers.reshape(-1)
        return view
