"""Judges the numbers of a call: results and gradients against the reference in float64.

A result may be off by its budget: three times what the reference in the call's own precision is off, and what no
kernel avoids: a rounding of the result and √n roundings of a sum of n terms (`tests.tolerance.budget`). Only where
that is not enough, what takes more calls of the reference is allowed on top: where an input is so badly conditioned
that the float64 result itself moves when the inputs move by a rounding, four times as much as that; and of a call in
float64, in which the reference cannot be seen to be off, what it is off in float32 with inputs rounded to it, in units
of a rounding.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tests.fuzz.call import Call, tensors_of, with_tensors
from tests.fuzz.cases import DTYPES, Case
from tests.fuzz.oracle import Answer, Failure, Figure, Outcome, answer, equal, wants, widened
from tests.fuzz.tensors import Maker

#: How many budgets are a fault. `make fuzz` takes one; a part that must pass on every processor takes more.
LENIENCY = 1.0
_FACTOR = 3.0  # times the reference's own error
_MOVES = 4.0  # times what a rounding of the inputs moves


def judge_numbers(case: Case, call: Call, make: Maker) -> Outcome:
    """Results and gradients against the reference in float64."""
    return _Numbers(case, call, make).judged()


class _Numbers:
    """A call with its gradients, and what the reference makes of the same.

    Attributes:
        mine: what the backend gave.
        stock: what the reference gives.
        exact: what the reference gives in float64.
    """

    def __init__(self, case: Case, call: Call, make: Maker) -> None:
        self.case, self.call = case, call
        self.wanted = wants(call, make)
        self.mine = answer(call, call.arguments, case.backend, self.wanted, None, make)
        torch.set_num_threads(1)  # what follows is the same on one, and small
        self.cotangents = {name: grad.double() for name, grad in self.mine.cotangents.items()}
        self.stock = self.mine
        if case.backend != "reference":
            self.stock = answer(call, call.arguments, "reference", self.wanted, self.mine.cotangents)
        self.exact = self.stock
        if any(t.is_floating_point() and t.dtype != torch.float64 for _, t in tensors_of(call.arguments)):
            self.exact = self._by_reference(widened(call.arguments))

    def _by_reference(self, arguments: dict[str, Any]) -> Answer:
        return answer(self.call, arguments, "reference", self.wanted, self.cotangents)

    @cached_property
    def moved(self) -> list[Answer]:
        """The exact answer where inputs are off by a rounding: each number for itself, or all in one direction."""
        wide = widened(self.call.arguments)
        return [self._by_reference(_moved(self.case, self.call, wide, together)) for together in (False, True)]

    @cached_property
    def narrow(self) -> tuple[Answer, Answer]:
        """What the reference gives in float32 with inputs rounded to it, and what it gives for these in float64."""
        rounded = with_tensors(self.call.arguments, lambda _, t: t.float() if t.is_floating_point() else t)
        narrow = answer(self.call, rounded, "reference", self.wanted, self.cotangents)
        return narrow, self._by_reference(widened(rounded))

    @cached_property
    def finite(self) -> bool:
        """Whether all inputs are."""
        leaves = (tensor for name, tensor in tensors_of(self.call.arguments) if name in self.call.leaves)
        return all(bool(torch.isfinite(tensor).all()) for tensor in leaves)

    def judged(self) -> Outcome:
        """The figures of all results and gradients."""
        figures = {}
        for part in ("results", "grads"):
            own, others = (getattr(found, part) for found in (self.mine, self.stock))
            if set(own) != set(others):
                raise Failure(f"gave {sorted(own)}, the reference {sorted(others)}")
            for name in own:
                figure = self._compared(part, name)
                if figure is not None:
                    figures[name] = figure
        return Outcome(figures=figures)

    def _compared(self, part: str, name: str) -> Figure | None:
        """How exact one result is; `None` where there is nothing to compare."""
        actual, stock, exact = (getattr(found, part)[name] for found in (self.mine, self.stock, self.exact))
        if actual.shape != stock.shape or actual.dtype != stock.dtype:
            raise Failure(
                f"{name} is {actual.dtype} {tuple(actual.shape)}, by the reference {stock.dtype} {tuple(stock.shape)}"
            )
        if not actual.is_floating_point():
            if not equal(actual, stock) and equal(stock, exact):
                raise Failure(f"{name} differs from the reference's")
            return None
        dtype = actual.dtype
        found = _Found(actual, stock, exact)
        if not found.finite():
            found = self._what_is_finite(name, found)
        elif self._overflows(name):
            return None
        if found is None or not found.exact.size:
            return None
        return self._figure(part, name, found, dtype)

    def _overflows(self, name: str) -> bool:
        """Whether it is up to the order of factors which product overflows first."""
        if self.case.values != "huge":
            return False
        arguments = self.call.arguments
        unsteady = bool(arguments.get("rescale")) or arguments.get("lse") is not None
        return "grad" in name or unsteady or _beyond(self.case, self.call)

    def _what_is_finite(self, name: str, found: _Found) -> _Found | None:
        """The numbers that can be compared, once those that are none are where they should be."""
        case, (actual, stock, exact) = self.case, found.all
        sane = np.isfinite(stock) & np.isfinite(exact)
        overflows = self._overflows(name)
        if not overflows and bool((~np.isfinite(actual) & sane).any()) and self.finite:
            raise Failure(f"{name} is not finite where it should be")
        same = (stock == exact) & ~sane  # an infinity that both have
        if not overflows and bool((actual[same] != stock[same]).any()) and self.finite:
            raise Failure(f"{name} is {actual[same][:4].tolist()}, should be {stock[same][:4].tolist()}")
        lost = np.isnan(stock) & np.isnan(exact) & ~np.isnan(actual)
        # With scales of 1 a mix is its last prediction, where the reference adds 0 · NaN for a tensor's gradient.
        kept = "grad" not in name and case.operation != "guidance_mix"
        if case.values == "nan" and kept and bool((lost & np.isfinite(actual)).any()):
            raise Failure(f"{name} lost a NaN")
        return None if overflows else found.at(sane & np.isfinite(actual))

    def _figure(self, part: str, name: str, found: _Found, dtype: torch.dtype) -> Figure:
        """The error of numbers that are finite, and its budget."""
        case, call = self.case, self.call
        # A map is measured by the row's largest probability, which is one over the number of keys at least.
        least = max(torch.finfo(dtype).tiny, _least_peak(case, name))
        sums = torch.promote_types(DTYPES[case.dtype], torch.float32)
        factor = 0.0 if case.backend == "reference" else _FACTOR
        rounding, step = torch.finfo(dtype).eps, torch.finfo(sums).eps
        error = found.error(least)
        allowed = factor * found.error_of_stock(least) + rounding + call.depth**0.5 * step
        if error <= allowed:
            return Figure(error, allowed)
        natural = max(least, _natural_size(call.arguments, self.mine.cotangents, part))
        away = max(found.distance(getattr(other, part)[name], natural) for other in self.moved)
        error, stocks = found.error(natural), found.error_of_stock(natural)
        if self.exact is self.stock and factor:
            stocks = self._rounded_like_float32(part, name, natural)
        exponent = _exponent(call.arguments, self.exact.results.get("lse"))
        # A logit off by its rounding is a factor of the probability.
        logits = math.expm1(min(exponent * step, 700.0))
        allowed = factor * stocks + rounding + call.depth**0.5 * step + logits + _MOVES * away
        if error > LENIENCY * allowed:
            raise Failure(
                f"{name} is off by {error:.3g}, allowed are {allowed:.3g} (the reference is off by {stocks:.3g}, a "
                f"rounding of the inputs moves it by {away:.3g})"
            )
        return Figure(error, allowed)

    def _rounded_like_float32(self, part: str, name: str, size: float) -> float:
        """What the reference is off in float64, if it loses as many bits there as it does in float32."""
        narrow, exact = (getattr(found, part)[name] for found in self.narrow)
        found = _Found(narrow, narrow, exact)
        found = found.at(np.isfinite(found.stock) & np.isfinite(found.exact))
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return found.error(size) * ratio if found.exact.size else 0.0


class _Found:
    """The same numbers by a backend, by the reference and exactly, in float64."""

    def __init__(self, actual: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor) -> None:
        self.actual = actual.double().numpy()
        self.stock = self.actual if stock is actual else stock.double().numpy()
        self.exact = self.stock if exact is stock else exact.double().numpy()
        self.places: np.ndarray | None = None

    @property
    def all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three."""
        return self.actual, self.stock, self.exact

    def finite(self) -> bool:
        """Whether all of them are."""
        return all(bool(np.isfinite(numbers).all()) for numbers in self.all)

    def at(self, places: np.ndarray) -> _Found:
        """The numbers at some places."""
        self.actual, self.stock, self.exact = (numbers[places] for numbers in self.all)
        self.places = places
        return self

    def _error(self, numbers: np.ndarray, size: float) -> float:
        scale = max(float(np.abs(self.exact).max()), size) or 1.0
        return float(np.abs(numbers - self.exact).max()) / scale

    def error(self, size: float) -> float:
        """The backend's largest error, as `tests.tolerance.relative_error` measures it."""
        return self._error(self.actual, size)

    def error_of_stock(self, size: float) -> float:
        """The reference's."""
        return 0.0 if self.stock is self.exact else self._error(self.stock, size)

    def distance(self, other: torch.Tensor, size: float) -> float:
        """How far other exact numbers are."""
        numbers = other.double().numpy()
        if self.places is not None:
            numbers = numbers[self.places]
        return self._error(np.where(np.isfinite(numbers), numbers, np.finfo(np.float64).max), size)


def _moved(case: Case, call: Call, wide: dict[str, Any], together: bool) -> dict[str, Any]:
    """The inputs off by a rounding: each number up or down, or all numbers of a tensor in one direction."""
    dtype = DTYPES[case.dtype]
    rounds = dtype if case.backend in ("triton", "stock") else torch.promote_types(dtype, torch.float32)
    eps, generator = torch.finfo(rounds).eps, torch.Generator().manual_seed(case.seed)

    def move(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in call.leaves:
            return tensor
        shape = () if together else tensor.shape
        sign = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
        return tensor * (1 + eps * sign)

    return with_tensors(wide, move)


def _largest(*tensors: torch.Tensor | None) -> float:
    """The largest finite number, regardless of sign."""
    found = (t.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() for t in tensors if t is not None and t.numel())
    return max(found, default=0.0)


def _scale(arguments: dict[str, Any]) -> float:
    scale = arguments.get("scale")
    return arguments["query"].shape[-1] ** -0.5 if scale is None else abs(scale)


def _least_peak(case: Case, name: str) -> float:
    """The least that the largest number of a map's row can be; 0 for a result that is no map."""
    if name == "maps" or (name, case.operation) == ("result", "temporal_maps"):
        return 1 / case.sizes.get("keys", case.sizes.get("frames", 1))
    return 0.0


def _repeats(arguments: dict[str, Any]) -> int:
    """How often a sample captures the key that it captures most often: its biases and gradients add up."""
    ids = arguments.get("token_ids")
    if ids is None:
        return 1
    rows = torch.atleast_2d(torch.as_tensor(ids))
    return max((int(row.bincount().max()) for row in rows), default=1)


def _beyond(case: Case, call: Call) -> bool:
    """Whether a logit is no number of the type that logits are computed in."""
    wide = torch.promote_types(DTYPES[case.dtype], torch.float32)
    return "query" in call.arguments and _exponent(call.arguments, None) > torch.finfo(wide).max / 64


def _exponent(arguments: dict[str, Any], lse: torch.Tensor | None) -> float:
    """The largest number that is rounded before it becomes an exponent: a logit, or a flow over its temperature."""
    if "query" in arguments:
        query, key = (arguments[name].double() for name in ("query", "key"))
        logits = _largest(_scale(arguments) * (query @ key.mT))
        strength = arguments["band"].strength if arguments.get("band") else arguments.get("strength", 0.0)
        added = _largest(*(arguments.get(name) for name in ("key_mask", "bias")))
        added += _repeats(arguments) * _largest(arguments.get("token_bias"))
        return max(logits * (1 + abs(float(strength))) + added, _largest(lse))
    if "sharpness" in arguments:
        return arguments["sharpness"] * _largest(arguments["flow"])
    temperature = arguments.get("temperature")
    if not temperature:
        return 0.0
    return (1 + _largest(*(tensor for _, tensor in tensors_of(arguments)))) / temperature


def _natural_size(arguments: dict[str, Any], cotangents: dict[str, torch.Tensor], part: str) -> float:
    """The size of the terms that a result is made of, where they cancel."""
    temperature = arguments.get("temperature") or 0.0
    if part == "results":
        return temperature
    arriving = {n: c.double().abs().max().item() if c.numel() else 0.0 for n, c in cotangents.items()}
    if "query" not in arguments:
        return max(arriving.values(), default=0.0) * max(1.0, arguments.get("sharpness", 0.0))

    def longest(tensor: torch.Tensor | None) -> float:
        if tensor is None or not tensor.numel():
            return 0.0
        return tensor.double().norm(dim=-1).nan_to_num(0.0, 0.0, 0.0).max().item()

    into = arriving.get("maps", 0.0) * _repeats(arguments)
    into += sum(size for name, size in arriving.items() if name not in ("out", "maps"))
    into += longest(cotangents.get("out")) * longest(arguments.get("value"))
    return into * max(1.0, _scale(arguments) * max(longest(arguments["query"]), longest(arguments["key"])))
