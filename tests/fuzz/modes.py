"""Judges of a call under what torch offers around it: each makes the call and says what must hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cvg_kernels.errors import CvgError
from tests.fuzz.call import Call, results_of, tensors_of, with_tensors
from tests.fuzz.cases import Case
from tests.fuzz.exactness import judge_numbers
from tests.fuzz.operations import OPERATIONS
from tests.fuzz.oracle import Failure, Outcome, Refused, answer, attempt, equal, wants
from tests.fuzz.tensors import Maker


def _same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str) -> None:
    if set(found) != set(wanted):
        raise Failure(f"{what}: gave {sorted(found)}, not {sorted(wanted)}")
    for name, tensor in found.items():
        if not equal(tensor.detach(), wanted[name].detach()):
            raise Failure(f"{what}: {name} is another than without")


def _no_grad(case: Case, call: Call, make: Maker) -> Outcome:
    return _under(case, call, make, torch.no_grad, "under no_grad")


def _inference(case: Case, call: Call, make: Maker) -> Outcome:
    return _under(case, call, make, torch.inference_mode, "under inference_mode")


def _under(case: Case, call: Call, make: Maker, mode: Callable, what: str) -> Outcome:
    """The same numbers, and no graph, though inputs want gradients."""
    wanted = wants(call, make)
    arguments = with_tensors(call.arguments, lambda name, t: t.detach().requires_grad_() if name in wanted else t)
    plain = attempt(call, call.arguments, case.backend)
    with mode():
        found = attempt(call, arguments, case.backend)
    given = [id(tensor) for _, tensor in tensors_of(arguments)]  # no round of blur gives an input back
    if any(tensor.requires_grad and id(tensor) not in given for tensor in found.values()):
        raise Failure(f"{what}: a result requires a gradient")
    _same(found, plain, what)
    return Outcome()


def _autocast(case: Case, call: Call, make: Maker) -> Outcome:
    """Attention casts its inputs as torch's own does, and nothing else is another than without."""
    casts = OPERATIONS[case.operation].casts

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        low = casts and name in ("query", "key", "value") and tensor.dtype != torch.float64
        return tensor.bfloat16() if low else tensor

    with torch.autocast("cpu", torch.bfloat16):
        found = answer(call, call.arguments, case.backend, wants(call, make), None, make)
    _same(found.results, attempt(call, with_tensors(call.arguments, cast), case.backend), "autocast")
    return Outcome()


def _deterministic(case: Case, call: Call, make: Maker) -> Outcome:
    """The same bits twice."""
    wanted = wants(call, make)
    torch.use_deterministic_algorithms(True)
    try:
        one = answer(call, call.arguments, case.backend, wanted, None, make)
        other = answer(call, call.arguments, case.backend, wanted, one.cotangents)
    finally:
        torch.use_deterministic_algorithms(False)
    _same(one.results, other.results, "twice")
    _same(one.grads, other.grads, "twice")
    return Outcome()


def _shapes(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str) -> None:
    if set(found) != set(wanted):
        raise Failure(f"{what}: gave {sorted(found)}, not {sorted(wanted)}")
    for name, tensor in found.items():
        have, want = ((t.dtype, tuple(t.shape)) for t in (tensor, wanted[name]))
        if have != want:
            raise Failure(f"{what}: {name} is {have}, not {want}")


def _meta(case: Case, call: Call, make: Maker) -> Outcome:
    """On the meta device results have the shapes and dtypes of real ones, or one of our errors says why not."""
    plain = _real(case, call)

    def to_meta(name: str, tensor: torch.Tensor) -> torch.Tensor:
        # Ids and the like may stay where they are; those on the meta device name no keys.
        return tensor.to("meta") if tensor.is_floating_point() or tensor.dtype == torch.bool else tensor

    found = _or_refused(call, with_tensors(call.arguments, to_meta), case.backend)
    if found is None:
        return Outcome(refused=True)
    _shapes(found, plain, "on the meta device")
    return Outcome()


def _fake(case: Case, call: Call, make: Maker) -> Outcome:
    """Fake tensors give fake results that lie in memory as real ones do."""
    plain = _real(case, call)
    with FakeTensorMode() as mode:
        arguments = with_tensors(call.arguments, lambda _, t: mode.from_tensor(t))
        found = _or_refused(call, arguments, case.backend)
    if found is None:
        return Outcome(refused=True)
    _shapes(found, plain, "of fake tensors")
    if case.backend != "reference":
        for name, tensor in found.items():
            have, want = (
                [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]
                for t in (tensor, plain[name])
            )
            if tensor.numel() and have != want:
                raise Failure(f"of fake tensors: {name} has strides {have}, not {want}")
    return Outcome()


def _real(case: Case, call: Call) -> dict[str, torch.Tensor]:
    return attempt(call, call.arguments, case.backend)


def _or_refused(call: Call, arguments: dict[str, Any], backend: str) -> dict | None:
    try:
        return attempt(call, arguments, backend)
    except Refused:
        return None


def _vmap(case: Case, call: Call, make: Maker) -> Outcome:
    """Two calls in one are what they are alone, or one of our errors says why not."""
    names = call.leaves
    given = dict(tensors_of(call.arguments))
    turned = {name: given[name].flip(-1) if given[name].ndim else given[name] for name in names}
    pairs = {name: torch.stack([given[name], turned[name]]) for name in names}

    def arguments_with(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return with_tensors(call.arguments, lambda name, t: tensors.get(name, t))

    def alone(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        arguments = arguments_with(dict(zip(names, tensors, strict=True)))
        return results_of(call.function(**arguments, backend=case.backend))

    if not names:
        return Outcome()
    apart = [attempt(call, arguments_with({n: pair[i] for n, pair in pairs.items()}), case.backend) for i in range(2)]
    try:
        found = torch.vmap(alone)(*pairs.values())
    except CvgError:
        return Outcome(refused=True)
    except Exception as error:
        raise Failure(f"under vmap: {type(error).__name__} that is none of ours: {error}") from error
    _close(found, {n: torch.stack([one[n] for one in apart]) for n in apart[0]}, "under vmap", case)
    return Outcome()


def _func_grad(case: Case, call: Call, make: Maker) -> Outcome:
    """torch.func.grad gives what torch.autograd.grad gives, or one of our errors says why not."""
    if not call.leaves:
        return Outcome()
    name = make.random.choice(call.leaves)
    given = dict(tensors_of(call.arguments))[name]

    def loss(tensor: torch.Tensor) -> torch.Tensor:
        arguments = with_tensors(call.arguments, lambda n, t: tensor if n == name else t)
        found = results_of(call.function(**arguments, backend=case.backend)).values()
        return sum((r.double().sum() for r in found if r.is_floating_point()), torch.zeros(()).double())

    try:
        found = torch.func.grad(loss)(given)
    except CvgError:
        return Outcome(refused=True)
    except Exception as error:
        raise Failure(f"under torch.func.grad: {type(error).__name__}, none of ours: {error}") from error
    leaf = given.detach().requires_grad_()
    total = loss(leaf)
    wanted = torch.zeros_like(given)
    if total.requires_grad:
        wanted = torch.autograd.grad(total, leaf)[0]
    _close({name: found}, {name: wanted}, "under torch.func.grad", case)
    return Outcome()


def _close(found, wanted, what: str, case: Case) -> None:
    """Nearly the same: sums may be taken in another order."""
    _shapes(found, wanted, what)
    if case.values not in ("normal", "grid", "zeros"):
        return
    for name, tensor in found.items():
        have, want = tensor.double(), wanted[name].double()
        if not have.numel() or equal(have, want):
            continue
        off = (have - want).nan_to_num(0.0).abs().max() / want.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1.0)
        if off > (0.05 if tensor.dtype.itemsize == 2 else 1e-3):
            raise Failure(f"{what}: {name} is off by {off.item():.3g}")


_JUNK = (
    None,
    "word",
    3.5,
    -1,
    [],
    [None],
    {},
    object,
    True,
    float("nan"),
    b"bytes",
    torch.zeros(()),
    torch.zeros(2, 3, 5, 7, 11, 13),
    torch.zeros(3, dtype=torch.complex64),
    torch.zeros(3, dtype=torch.uint16),
    torch.zeros(0),
    torch.ones(2, 2, dtype=torch.int64),
    torch.zeros(1, 1, 1, 1),
    torch.zeros(2, 2, dtype=torch.bool),
    torch.zeros(2, 3, 4, 5, device="meta"),
    torch.eye(3).to_sparse(),
    torch.zeros(1, 1, 1, 1, dtype=torch.float8_e4m3fn),
    "mangled",
)


def _broken(case: Case, call: Call, make: Maker) -> Outcome:
    """With one argument that may not fit, a call works or one of our errors says what is wrong."""
    name = make.random.choice([*call.arguments])
    junk = make.random.choice(_JUNK)
    given = call.arguments[name]
    if isinstance(junk, str) and junk == "mangled" and isinstance(given, torch.Tensor):
        junk = make.random.choice((given[..., None], given[:0], given.to(torch.int32), given.cfloat()))
    elif isinstance(given, (list, tuple)) and given and make.random.random() < 0.5:
        junk = type(given)([junk, *given[1:]]) if type(given) in (list, tuple) else junk
    broken = call._replace(arguments=call.arguments | {name: junk})
    try:
        attempt(broken, broken.arguments, case.backend)
    except Refused:
        return Outcome(refused=True)
    except Failure as failure:
        raise Failure(f"{name}={junk!r}: {failure}") from failure
    return Outcome()


#: Mode → who judges a call in it.
JUDGES: dict[str, Callable[[Case, Call, Maker], Outcome]] = {
    "plain": judge_numbers,
    "no_grad": _no_grad,
    "inference": _inference,
    "autocast": _autocast,
    "deterministic": _deterministic,
    "meta": _meta,
    "fake": _fake,
    "vmap": _vmap,
    "func_grad": _func_grad,
    "broken": _broken,
}
