"""The largest errors that a run saw, and the docs' page of them: docs/accuracy.json and docs/accuracy.md."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.cases import Case

_DOCS = Path(__file__).parents[2] / "docs"


class Largest(NamedTuple):
    """The result of a kind that came nearest to its budget."""

    share: float  #: of the budget
    error: float  #: relative to the largest number of the exact result
    number: int  #: of the call


class Numbers:
    """The largest share of its budget that any result of a kind had."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, ...], Largest] = {}
        self.compared: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self.refused: defaultdict[str, int] = defaultdict(int)

    def note(self, case: Case, number: int, outcome: Any) -> None:
        """Takes in what became of a call."""
        if outcome.refused:
            self.refused[f"{case.operation} {case.mode}"] += 1
        for name, figure in outcome.figures.items():
            name = name.partition("[")[0]  # the hops of a list are of one kind
            found = Largest(figure.error / figure.budget, figure.error, number)
            self._take((case.backend, case.operation, name, case.dtype), found, 1)

    def lines(self) -> list[list]:
        """All of it, as JSON can hold it."""
        return [[*kind, *largest, self.compared[kind]] for kind, largest in self.kinds.items()]

    def add(self, lines: list[list]) -> None:
        """Takes in what another process noted."""
        for *kind, share, error, number, compared in lines:
            self._take(tuple(kind), Largest(share, error, number), compared)

    def _take(self, kind: tuple[str, ...], found: Largest, compared: int) -> None:
        self.compared[kind] += compared
        if kind not in self.kinds or found.share > self.kinds[kind].share:
            self.kinds[kind] = found


def write(numbers: Numbers, seed: int, calls: dict[str, int]) -> None:
    """Writes both files: backends that this run did not call keep the rows they had."""
    file = _DOCS / "accuracy.json"
    there = json.loads(file.read_text()) if file.exists() else {"runs": {}, "rows": []}
    runs = there["runs"] | {name: {"seed": seed, "calls": made} for name, made in calls.items()}
    rows = [row for row in there["rows"] if row["backend"] not in calls]
    for (backend, operation, result, dtype), largest in numbers.kinds.items():
        rows.append(
            {
                "backend": backend,
                "operation": operation,
                "result": result,
                "dtype": dtype,
                "share": round(largest.share, 3),
                "error": float(f"{largest.error:.2e}"),
                "call": largest.number,
                "compared": numbers.compared[backend, operation, result, dtype],
            }
        )
    rows.sort(key=lambda row: tuple(row[name] for name in ("operation", "result", "backend", "dtype")))
    listed = ",\n  ".join(json.dumps(row) for row in rows)
    file.write_text(f'{{"runs": {json.dumps(runs)},\n "rows": [\n  {listed}\n]}}\n')
    (_DOCS / "accuracy.md").write_text(page({"runs": runs, "rows": rows}))


_HEAD = """# Accuracy

Written by `make fuzz FUZZ_ARGS=--write`, never by hand. Each number is the largest share of its budget that an error
had in any of the generated calls that were compared with the reference in float64. Above 1 is a failure, and there is
none.

The budget of a result is three times what the reference is off in the call's own precision (for the reference itself:
nothing), and on top what no kernel avoids: a rounding of the result, and √n roundings of a sum of n terms. Some
inputs are badly conditioned: the exact result itself moves when they move by a rounding. There four times this move
is allowed as well, and the roundings of a logit, or of a flow over its temperature, before it is an exponent.

The calls have sizes from 0 to 257, primes among them, in every layout and form of mask, with numbers from denormal to
10³⁰, ties, NaN and infinities; what came out finite is compared.

"""


_TRITON = "`triton` runs in Triton's interpreter."
_NO_TRITON = (
    "`triton` and `stock` have no table: no run of their generated calls was written down for this release. The\n"
    "tests of the operations (`tests/ops`) hold both to the reference in float64."
)


def page(found: dict) -> str:
    """The docs' page."""
    lines = [_HEAD, "| backend | calls | seed |", "| --- | --- | --- |"]
    for name, run in sorted(found["runs"].items()):
        lines.append(f"| `{name}` | {run['calls']:,} | {run['seed']} |".replace(",", " "))
    lines += ["", _TRITON if "triton" in found["runs"] else _NO_TRITON, ""]
    for backend in sorted({row["backend"] for row in found["rows"]}):
        rows = [row for row in found["rows"] if row["backend"] == backend]
        dtypes = [d for d in ("float32", "bfloat16", "float16", "float64") if any(r["dtype"] == d for r in rows)]
        lines += [
            f"## {backend}",
            "",
            f"| operation | result | {' | '.join(dtypes)} |",
            "| --- " * (2 + len(dtypes)) + "|",
        ]
        shares: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        for row in rows:
            shares[row["operation"], row["result"]][row["dtype"]] = row["share"]
        for (operation, result), share in sorted(shares.items()):
            cells = " | ".join(f"{share[d]:.2f}" if d in share else "" for d in dtypes)
            lines.append(f"| `{operation}` | {result} | {cells} |")
        lines.append("")
    return "\n".join(lines)
