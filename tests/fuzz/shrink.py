"""Makes a failing call small: what still fails with less is taken, until nothing less does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.fuzz.cases import Case


def shrunk(case: Case, operations: dict, fails: Callable[[Case], bool], tries: int = 400) -> Case:
    """The smallest call found that still fails.

    Args:
        case: a call that fails.
        operations: `OPERATIONS`, for what its sizes and options may be.
        fails: makes a call and says whether it fails.
        tries: calls to make at most.
    """
    while True:
        for smaller in _smaller(case, operations[case.operation]):
            tries -= 1
            if fails(smaller):
                case = smaller
                break
            if tries <= 0:
                return case
        else:
            return case


def _smaller(case: Case, operation) -> Iterator[Case]:
    """Calls that are simpler in one thing, the largest steps first."""
    plain = {"mode": "plain", "layout": "plain", "values": "normal", "threads": 1, "dtype": "float32"}
    for name, value in plain.items():
        if getattr(case, name) != value and (name != "dtype" or value in operation.dtypes):
            yield case.changed(**{name: value})
    for name, choices in operation.options.items():
        if case.options[name] != choices[0]:
            yield case.changed(**{name: choices[0]})
    for name, bounds in operation.sizes.items():
        size, least = case.sizes[name], max(bounds.least, 1)
        for less in dict.fromkeys((least, (size + least) // 2, size - 1)):
            if least <= less < size:
                yield case.changed(**{name: less})
