"""Makes a call and judges it: against the reference in float64, or one of our errors.

A result may be off by its budget: three times what the reference in the call's own precision is off, and what no
kernel avoids (`tests.tolerance.budget`). Where an input is so badly conditioned that the float64 result itself moves
when the inputs move by a rounding, it may be off by four times as much as that, too.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from cvg_kernels.errors import BackendUnavailableError, CvgError
from tests.fuzz.call import Call, results_of, tensors_of, with_tensors
from tests.fuzz.cases import DTYPES, Case
from tests.fuzz.operations import OPERATIONS
from tests.fuzz.tensors import Maker
from tests.memory import guarded
from tests.tolerance import budget, relative_error

#: How many budgets are a fault. `make fuzz` takes one; a part that must pass on every processor takes more.
LENIENCY = 1.0
_FACTOR = 3.0  # times the reference's own error
_MOVES = 4.0  # times what a rounding of the inputs moves


class Failure(AssertionError):
    """A call did what it must not; the message says what."""


class Refused(Exception):
    """A call was refused by one of our errors, which is the cause."""


class Figure(NamedTuple):
    """How exact a result was."""

    error: float  #: relative to the largest number of the exact result
    budget: float


class Outcome(NamedTuple):
    """A call that did what it should."""

    refused: bool = False
    figures: dict[str, Figure] = {}  #: of results, and of gradients as `grad query`


class Answer(NamedTuple):
    """Results of a call by name, the gradients of inputs by name, and the gradients that went in."""

    results: dict[str, torch.Tensor]
    grads: dict[str, torch.Tensor]
    cotangents: dict[str, torch.Tensor]


def examine(case: Case) -> Outcome:
    """Makes a call and judges it.

    Raises:
        Failure: if it did what it must not.
    """
    from tests.fuzz import modes  # which judges by what stands here

    torch.set_num_threads(case.threads)
    make = Maker(case)
    call = OPERATIONS[case.operation].build(case, make)
    before = [(name, tensor, tensor.clone()) for name, tensor in tensors_of(call.arguments)]
    with guarded() as guards:
        try:
            outcome = modes.JUDGES[case.mode](case, call, make)
        except Refused as refused:
            outcome = _judge_refusal(call, refused.__cause__)
        except Failure as failure:
            raise Failure(_written(before) or str(failure)) from failure
        touched = guards.touched(whole_results=not outcome.refused)
        if touched:
            raise Failure(touched)
    if _written(before):
        raise Failure(_written(before))
    return outcome


def _written(before: list[tuple[str, torch.Tensor, torch.Tensor]]) -> str | None:
    """Which of the inputs is another than before."""
    for name, tensor, copy in before:
        if not equal(tensor.detach(), copy):
            return f"{name} was written to"
    return None


def _judge_refusal(call: Call, error: BaseException) -> Outcome:
    if isinstance(error, BackendUnavailableError):
        return Outcome(refused=True)
    if re.search(call.refusal or "is not supported by backend", str(error)):
        return Outcome(refused=True)
    try:
        attempt(call, call.arguments, "reference")
    except Refused as other:
        if str(other.__cause__) == str(error):
            return Outcome(refused=True)
        raise Failure(f"refused with {error!r}, by the reference with {other.__cause__!r}") from None
    raise Failure(f"refused, though it fits: {error!r}") from error


def attempt(call: Call, arguments: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """The results of a call by name.

    Raises:
        Refused: for one of our errors.
        Failure: for any other.
    """
    try:
        return results_of(call.function(**arguments, backend=backend))
    except CvgError as error:
        raise Refused(str(error)) from error
    except Exception as error:
        raise Failure(f"{type(error).__name__} that is none of ours: {error}") from error


def answer(
    call: Call,
    arguments: dict[str, Any],
    backend: str,
    wanted: tuple[str, ...] = (),
    cotangents: dict[str, torch.Tensor] | None = None,
    make: Maker | None = None,
) -> Answer:
    """Results of a call, and gradients.

    Args:
        call: the function.
        arguments: of it.
        backend: that is asked for.
        wanted: names of the tensors that want a gradient.
        cotangents: gradients of some results; `None`: drawn from `make`.
        make: of the case.
    """

    def leaf(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().requires_grad_() if name in wanted else tensor

    given = with_tensors(arguments, leaf)
    results = attempt(call, given, backend)
    differentiable = {n: result for n, result in results.items() if result.requires_grad}
    if cotangents is None:
        cotangents = {} if make is None else _drawn(differentiable, make)
    outputs = {name: results[name] for name in cotangents if name in differentiable}
    leaves = {name: tensor for name, tensor in tensors_of(given) if name in wanted}
    grads = {f"grad {n}": torch.zeros_like(leaf) for n, leaf in leaves.items() if cotangents}
    if outputs and leaves:
        try:
            found = torch.autograd.grad(
                list(outputs.values()),
                list(leaves.values()),
                [cotangents[n].to(r.dtype) for n, r in outputs.items()],
                allow_unused=True,
            )
        except CvgError as error:
            raise Refused(str(error)) from error
        except Exception as error:
            raise Failure(f"{type(error).__name__} in the backward pass: {error}") from error
        grads |= {f"grad {n}": g for n, g in zip(leaves, found, strict=True) if g is not None}
    return Answer({n: r.detach() for n, r in results.items()}, grads, cotangents)


def _drawn(results: dict[str, torch.Tensor], make: Maker) -> dict[str, torch.Tensor]:
    """Gradients of some of the results, some of them expanded from one number."""
    some = {n: r for n, r in results.items() if make.random.random() < 0.7} or results
    drawn = {}
    for name, result in some.items():
        numbers = make.normal(*result.shape).to(result.dtype)
        if make.random.random() < 0.2 and result.numel():
            numbers = numbers.flatten()[0].expand(result.shape)
        drawn[name] = numbers
    return drawn


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with every floating point tensor in float64."""
    return with_tensors(arguments, lambda _, t: t.double() if t.is_floating_point() else t)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same to the bit, NaN like NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one != one) & (other != other)).all())


def wants(call: Call, make: Maker) -> tuple[str, ...]:
    """The inputs that want a gradient: none, one, some or all."""
    return tuple(name for name in call.leaves if make.random.random() < 0.6)


def judge_numbers(case: Case, call: Call, make: Maker) -> Outcome:
    """Results and gradients against the reference in float64."""
    wanted = wants(call, make)
    mine = answer(call, call.arguments, case.backend, wanted, None, make)
    torch.set_num_threads(1)  # what follows is the same on one, and small
    stock = answer(call, call.arguments, "reference", wanted, mine.cotangents)
    wide = widened(call.arguments)
    cotangents = {name: grad.double() for name, grad in mine.cotangents.items()}
    exact = answer(call, wide, "reference", wanted, cotangents)
    leaves = [tensor for name, tensor in tensors_of(call.arguments) if name in call.leaves]
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in leaves)
    moved: list[Answer] = []

    def conditioned() -> list[Answer]:
        """The exact answer where inputs are off by a rounding."""
        if not moved:
            moved.extend(
                answer(call, _moved(case, call, wide, one), "reference", wanted, cotangents) for one in (False, True)
            )
        return moved

    figures = {}
    for part in ("results", "grads"):
        own, others, exacts = (getattr(found, part) for found in (mine, stock, exact))
        if set(own) != set(others):
            raise Failure(f"gave {sorted(own)}, the reference {sorted(others)}")
        for name, actual in own.items():
            expected = exacts[name]
            figure = _compared(
                case,
                call,
                name,
                actual,
                others[name],
                expected,
                finite,
                lambda n=name, p=part: [getattr(a, p)[n] for a in conditioned()],
                lambda p=part: _natural_size(call.arguments, mine.cotangents, p),
                exact.results.get("lse"),
            )
            if figure is not None:
                figures[name] = figure
    return Outcome(figures=figures)


def _compared(case, call, name, actual, stock, exact, finite, moved, size, lse) -> Figure | None:
    """How exact one result is; `None` where there is nothing to compare."""
    if actual.shape != stock.shape or actual.dtype != stock.dtype:
        raise Failure(
            f"{name} is {actual.dtype} {tuple(actual.shape)}, by the reference {stock.dtype} {tuple(stock.shape)}"
        )
    if not actual.is_floating_point():
        if not equal(actual, stock) and equal(stock, exact):
            raise Failure(f"{name} differs from the reference's")
        return None
    sane = torch.isfinite(stock) & torch.isfinite(exact)
    # Which product overflows first is up to the order of factors.
    unsteady = bool(call.arguments.get("rescale")) or call.arguments.get("lse") is not None
    overflows = case.values == "huge" and ("grad" in name or unsteady or _beyond(case, call))
    if finite and not overflows and bool((~torch.isfinite(actual) & sane).any()):
        raise Failure(f"{name} is not finite where it should be")
    same = (stock == exact) & ~sane  # an infinity that both have
    if finite and not overflows and bool((actual[same] != stock[same]).any()):
        raise Failure(f"{name} is {actual[same][:4].tolist()}, should be {stock[same][:4].tolist()}")
    lost = stock.isnan() & exact.isnan() & ~actual.isnan()
    # With scales that are 1 a mix is its last prediction, where the reference adds 0 · NaN for a tensor's gradient.
    kept = "grad" not in name and case.operation != "guidance_mix"
    if case.values == "nan" and kept and bool((lost & torch.isfinite(actual)).any()):
        raise Failure(f"{name} lost a NaN")
    sane &= torch.isfinite(actual)
    if overflows or not bool(sane.any()):
        return None
    actual, stock, exact = actual[sane], stock[sane], exact[sane]
    # A map is measured by the row's largest probability, which is one over the number of keys at least.
    least = max(torch.finfo(actual.dtype).tiny, _least_peak(case, name))
    sums = torch.promote_types(DTYPES[case.dtype], torch.float32)
    factor = 0.0 if case.backend == "reference" else _FACTOR
    error = relative_error(actual, exact, least)
    allowed = budget(actual, stock, exact, factor, call.depth, least, sums=sums)
    if error > allowed:
        natural = max(least, size())
        away = max(
            relative_error(torch.where(torch.isfinite(a[sane]), a[sane], torch.finfo(a.dtype).max), exact, natural)
            for a in moved()
        )
        error = relative_error(actual, exact, natural)
        exponent = _exponent(call.arguments, lse)
        allowed = budget(actual, stock, exact, factor, call.depth, natural, exponent, sums)
        allowed += _MOVES * away
    if error > LENIENCY * allowed:
        stocks = relative_error(stock, exact, natural)
        raise Failure(
            f"{name} is off by {error:.3g}, allowed are {allowed:.3g} (the reference is off by {stocks:.3g}, a "
            f"rounding of the inputs moves it by {away:.3g})"
        )
    return Figure(error, allowed)


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
        return max(arriving.values(), default=0.0)

    def longest(tensor: torch.Tensor | None) -> float:
        if tensor is None or not tensor.numel():
            return 0.0
        return tensor.double().norm(dim=-1).nan_to_num(0.0, 0.0, 0.0).max().item()

    into = arriving.get("maps", 0.0) * _repeats(arguments)
    into += sum(size for name, size in arriving.items() if name not in ("out", "maps"))
    into += longest(cotangents.get("out")) * longest(arguments.get("value"))
    return into * max(1.0, _scale(arguments) * max(longest(arguments["query"]), longest(arguments["key"])))
