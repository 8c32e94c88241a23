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


def add(runs: list[dict[str, Any]], anew: bool = False) -> None:
    """Adds runs to both files.

    Args:
        runs: seed, backend, first, made and numbers of each.
        anew: leave out what the files have of these backends.

    Raises:
        ValueError: if some of the calls are counted there already.
    """
    file = _DOCS / "accuracy.json"
    found = json.loads(file.read_text()) if file.exists() else {"runs": [], "rows": []}
    given = {run["backend"] for run in runs}
    if anew:
        found = {part: [one for one in found[part] if one["backend"] not in given] for part in found}
    for run in runs:
        _check_new(run, found["runs"])
        names = ("backend", "seed", "first")
        found["runs"].append({name: run[name] for name in names} | {"calls": run["made"]})
        _merge(run, found["rows"])
    found["runs"].sort(key=lambda run: (run["backend"], run["seed"], run["first"]))
    found["rows"].sort(key=lambda row: tuple(row[name] for name in ("operation", "result", "backend", "dtype")))
    listed = {part: ",\n  ".join(json.dumps(one) for one in found[part]) for part in ("runs", "rows")}
    file.write_text(f'{{"runs": [\n  {listed["runs"]}\n ],\n "rows": [\n  {listed["rows"]}\n]}}\n')
    (_DOCS / "accuracy.md").write_text(page(found))


def _check_new(run: dict[str, Any], there: list[dict[str, Any]]) -> None:
    for other in there:
        alike = all(run[name] == other[name] for name in ("backend", "seed"))
        if alike and max(run["first"], other["first"]) < min(
            run["first"] + run["made"], other["first"] + other["calls"]
        ):
            raise ValueError(f"docs/accuracy.json has calls of these already: {other}")


def _merge(run: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Takes the figures of a run into the rows: of each kind the largest share, and how many were compared."""
    names = ("backend", "operation", "result", "dtype")
    there = {tuple(row[name] for name in names): row for row in rows}
    for *kind, share, error, number, compared in run["numbers"]:
        row = there.get(tuple(kind))
        before = row["compared"] if row else 0
        if row is None:
            row = dict(zip(names, kind, strict=True)) | {"share": -1.0}
            rows.append(row)
        if share > row["share"]:
            figures = {"share": round(share, 3), "error": float(f"{error:.2e}")}
            row.update(figures | {"seed": run["seed"], "call": number})
        row["compared"] = before + compared


_HEAD = """# Accuracy

Written by `make fuzz FUZZ_ARGS=--write`, which adds its calls to those made before, never by hand. Each number is the
largest share of its budget that an error had in any of the generated calls that were compared with the reference in
float64. Above 1 is a failure, and there is none.

The budget of a result is three times what the reference is off in the call's own precision (for the reference itself:
nothing), and on top what no kernel avoids: a rounding of the result, and √n roundings of a sum of n terms. Some
inputs are badly conditioned: the exact result itself moves when they move by a rounding. There four times this move
is allowed as well, and the roundings of a logit, or of a flow over its temperature, before it is an exponent. Of a
call in float64, in which the reference cannot be seen to be off, its error in float32 in units of a rounding counts.

The calls have sizes from 0 to 257, primes among them, in every layout and form of mask, with numbers from denormal to
10³⁰, ties, NaN and infinities; what came out finite is compared.

"""


_TRITON = "`triton` runs in Triton's interpreter."
_WITHOUT = (
    "{names} no table: no run of generated calls was written down for this release. The tests of the\n"
    "operations (`tests/ops`) hold every backend to the reference in float64."
)
_BACKENDS = ("native", "reference", "triton", "stock")


def page(found: dict) -> str:
    """The docs' page."""
    lines = [_HEAD, "| backend | calls | of them | seed |", "| --- | --- | --- | --- |"]
    for run in found["runs"]:
        last = run["first"] + run["calls"] - 1
        cells = (f"`{run['backend']}`", f"{run['calls']:,}", f"{run['first']:,} to {last:,}", str(run["seed"]))
        lines.append(f"| {' | '.join(cells)} |".replace(",", " "))
    there = {run["backend"] for run in found["runs"]}
    for name in sorted(there):
        total = sum(run["calls"] for run in found["runs"] if run["backend"] == name)
        lines.append(f"| **`{name}`** | **{total:,}** | in all | |".replace(",", " "))
    lines += [""] + ([_TRITON, ""] if "triton" in there else [])
    missing = [f"`{name}`" for name in _BACKENDS if name not in there]
    if missing:
        lines += [_WITHOUT.format(names=" and ".join(missing) + (" have" if len(missing) > 1 else " has")), ""]
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
