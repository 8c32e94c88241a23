"""Measures which backend is fastest for a class of calls, on this machine: what `auto`'s table is made of.

Every kernel that can serve a class computes a small call of it first, against the reference in float64: one that is
wrong is never chosen. Then all of them compute a call of the size that models have, in turn, and the medians are
compared.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from cvg_kernels import auto
from cvg_kernels.bench.harness import machine, median_seconds
from cvg_kernels.bench.tuning_cases import Case, Run
from cvg_kernels.errors import ArgumentError
from cvg_kernels.kernels import Backend, kernels_of
from cvg_kernels.ops._choice import why_not

ROUNDS = {"cpu": 7, "cuda": 30}
#: Medians this near to the fastest are as good: the order of before stays.
_NEAR = 1.03


def tune(
    device: torch.device, some: Iterable[Case], *, rounds: int, show: Callable[[dict[str, Any], dict[str, Any]], None]
) -> dict[str, Any]:
    """Measures cases and decides on an order for each class.

    Args:
        device: where.
        some: what to measure.
        rounds: timed rounds; the median counts.
        show: called after each case with its figures and all of the report so far.

    Returns:
        What `--json` writes: the machine, and under "choices" the figures of each case; `rules_of` makes rules of it.
    """
    report = {
        **machine(device),
        "architecture": auto.architecture(device),
        "device_name": auto.device_name(device),
        "rounds": rounds,
        "choices": [],
    }
    for case in some:
        try:
            figures = measure(case, device, rounds)
        except torch.OutOfMemoryError:
            figures = _figures(case, device) | {"absent": {"all": "the memory of this device is too small"}}
        report["choices"].append(figures)
        show(figures, report)
    return report


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    """The figures of one case and the order that follows from them.

    Kernels that cannot serve it are under "absent", wrong ones under "wrong", each with the reason; "order" is empty
    where fewer than two are left, since there is nothing to choose.
    """
    facts, figures = case.facts(device), _figures(case, device)
    # The reference takes every device, and is not timed: its matrices do not fit.
    named = [one for one, kernel in kernels_of(case.operation).items() if device.type in kernel.devices]
    absent = {one: why_not(case.operation, one, facts) for one in named}
    available = [one for one in named if absent[one] is None]
    figures["absent"] = {one.value: why for one, why in absent.items() if why is not None}
    if len(available) < 2:
        return figures
    figures["wrong"] = wrong_ones(case.ready(device, small=True), available, case.dtype)
    right = [one for one in available if one.value not in figures["wrong"]]
    run = case.ready(device, small=False)
    figures["seconds"] = median_seconds({one.value: (lambda one=one: run.by(one)) for one in right}, device, rounds)
    before = auto.order(case.operation, facts)
    figures["order"] = [one.value for one in fastest_first(figures["seconds"], before)]
    return figures


def _figures(case: Case, device: torch.device) -> dict[str, Any]:
    """What is known of a case before it is measured."""
    return {
        "operation": case.operation,
        "when": auto.traits(case.operation, case.facts(device)),
        "dtype": str(case.dtype).removeprefix("torch."),
        "sizes": case.sizes(),
        "absent": {},
        "wrong": {},
        "seconds": {},
        "order": [],
    }


def wrong_ones(run: Run, backends: Sequence[Backend], dtype: torch.dtype) -> dict[str, str]:
    """The kernels whose results are not those of the reference, each with what is wrong."""
    wanted, found = run.exact(), {}
    # 16 bits: a few roundings of the result, and of the probabilities before their product. Else: sums of a hundred
    # terms in other orders, and exponentials by polynomials.
    allowed = (8 if dtype.itemsize == 2 else 1000) * torch.finfo(dtype).eps
    for backend in backends:
        try:
            results = run.by(backend)
        except Exception as error:  # compilers raise their own
            found[backend.value] = f"it fails: {type(error).__name__}: {str(error).strip()[:200]}"
            continue
        for have, want in zip(results, wanted, strict=True):
            if have is None or want is None:
                continue
            error = ((have.double() - want).abs().max() / want.abs().max()).item()
            if not error <= allowed:
                found[backend.value] = f"it is off by {error:.2g}, where {allowed:.2g} is allowed"
    return found


def fastest_first(seconds: Mapping[str, float | str], before: Sequence[Backend]) -> tuple[Backend, ...]:
    """The backends that ran, the fastest first; those as good as it in the order of before."""
    ran = {Backend(name): took for name, took in seconds.items() if not isinstance(took, str)}
    if not ran:
        return ()
    near = _NEAR * min(ran.values())

    def rank(backend: Backend) -> tuple:
        if ran[backend] > near:
            return (1, ran[backend])
        return (0, before.index(backend) if backend in before else len(before))

    return tuple(sorted(ran, key=rank))


# --- tables ----------------------------------------------------------------------------------------------------------


def rules_of(report: Mapping[str, Any]) -> list[auto.Rule]:
    """The rules that follow from what `tune` returned.

    Raises:
        ArgumentError: if it is something else.
    """
    try:
        return [
            auto.Rule(one["operation"], dict(one["when"]), tuple(map(Backend, one["order"])))
            for one in report["choices"]
            if one["order"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"a file of `cvg-kernels tune --json` was expected, got something else ({type(error).__name__}: {error})"
        ) from None


def section_of(results: Any) -> Mapping[str, Any]:
    """What `tune --json` wrote, in its own file or in the section "tune" of a result file of `make gpu`."""
    found = results.get("tune", results) if isinstance(results, dict) else {}
    if isinstance(found, dict) and isinstance(found.get("measured"), dict):
        found = found["measured"]
    names = ("architecture", "device_name")
    named = isinstance(found, dict) and all(isinstance(found.get(name), str) for name in names)
    if not named or not isinstance(found.get("choices"), list):
        raise ArgumentError('the file holds no figures of `cvg-kernels tune`: no section "tune"')
    return found


def made_by(report: Mapping[str, Any]) -> str:
    """When and where a table was measured."""
    return f"{report.get('date', datetime.date.today().isoformat())} by cvg-kernels tune on {report['device_name']}"
