"""Makes a call and judges it: its numbers, what must hold in its mode, or one of our errors."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from cvg_kernels.errors import BackendUnavailableError, CvgError
from tests.fuzz.call import Call, results_of, tensors_of, with_tensors
from tests.fuzz.cases import Case
from tests.fuzz.operations import OPERATIONS
from tests.fuzz.tensors import Maker
from tests.memory import guarded


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
    return torch.equal(one, other) or bool(((one == other) | (one != one) & (other != other)).all())


def wants(call: Call, make: Maker) -> tuple[str, ...]:
    """The inputs that want a gradient: none, one, some or all."""
    return tuple(name for name in call.leaves if make.random.random() < 0.6)
