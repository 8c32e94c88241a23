"""The table of what works on which pipeline:
docs/coverage.json, which tests write, and docs/coverage.md, its picture.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
JSON = DOCS / "coverage.json"
PAGE = DOCS / "coverage.md"
RELEASES = DOCS / "releases.json"  # by make matrix

#: Column → its heading and what it says. Numbers are bounds of an error; other columns are "yes", "no" or words.
COLUMNS: dict[str, tuple[str, str]] = {
    "kind": ("attention to text", "as it was seen in the stock run"),
    "capture": (
        "capture",
        "largest difference of a captured map from softmax(q kᵀ), in float64 from the stock run's own queries and "
        "keys",
    ),
    "gradient": (
        "gradient",
        "relative difference of the gradient that a loss of the maps has on the latents from that of eager PyTorch",
    ),
    "output": ("output", "largest change of a denoiser's answers by capture, relative to the largest"),
    "swap": ("swap", "the same with `cvg.processors`, every swapped layer by our CPU kernels"),
    "vico": ("Vico", "a guided step: made, finite, and moving the video"),
    "cvg": ("CVG", "the same, with a classifier of random weights"),
    "vstar": ("VSTAR", "the same, of VSTAR's band"),
    "gen1": ("Gen-1", "the same, of Gen-1's mixing"),
    "compile": ("compile", "maps of a denoiser under `torch.compile`"),
    "context_parallel": ("context parallel", "maps by two processes"),
    "releases": ("releases", "of diffusers in which capture is right ([more](releases.md)); others: the newest alone"),
}
#: Columns whose values are bounds, and what they may not exceed: what rounding makes of a float32 number.
LIMITS = {"capture": 1e-5, "gradient": 1e-4, "output": 1e-5, "swap": 1e-5}


def read() -> dict[str, Any]:
    """The committed table."""
    return json.loads(JSON.read_text()) if JSON.exists() else {"rows": {}, "left_out": {}}


def releases() -> dict[str, str]:
    """Row → the releases of diffusers in which `make matrix` found capture right, the first and the last."""
    right: dict[str, list[str]] = {}
    for release, found in json.loads(RELEASES.read_text())["releases"].items():
        for name, checks in found["checks"].items():
            if checks.get("capture") == "right":
                right.setdefault(name, []).append(release)
    return {name: f"{spans[0]} to {spans[-1]}" for name, spans in right.items()}


def agrees(value: Any, committed: Any) -> bool:
    """Whether a value that was measured is the committed one, or within the committed bound."""
    if isinstance(value, float):
        return isinstance(committed, float) and value <= committed
    return value == committed


def settled(value: Any, committed: Any, most: float = math.inf) -> Any:
    """What is written for a measured value: for an error a bound, which changes only where there is a reason.

    Args:
        value: that was measured.
        committed: what the table has.
        most: the largest bound.
    """
    if not isinstance(value, float):
        return value
    if isinstance(committed, float) and committed / 1000 < value <= committed <= most:
        return committed
    # room for what the order of sums makes of it on other machines; float32 ends at 1e-7
    return min(most, 10.0 ** math.ceil(math.log10(max(4 * value, 1e-7))))


def write(notes: list[tuple[str, str, Any]]) -> None:
    """Puts what was noted into the table and writes both files.

    Args:
        notes: (row, column, value); a column that nobody noted stays as it is.
    """
    from tests.coverage.facts import LEFT_OUT
    from tests.pipelines import PIPELINES

    before = read()["rows"]
    rows = {name: {**before.get(name, {}), "denoiser": case.denoiser} for name, case in PIPELINES.items()}
    for name, column, value in notes:
        there = before.get(name, {}).get(column)
        rows[name][column] = settled(value, there, LIMITS.get(column, math.inf))
    for name, span in releases().items():
        rows[name]["releases"] = span
    order = ("pipeline", "denoiser", *COLUMNS, "why", "refused")
    rows = {name: {key: row[key] for key in order if row.get(key) is not None} for name, row in rows.items()}
    table = {"rows": rows, "left_out": dict(sorted(LEFT_OUT.items()))}
    JSON.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(table))


def counts(table: dict[str, Any]) -> dict[str, int]:
    """How many classes and pipelines are right."""
    rows = table["rows"].values()
    right = [row for row in rows if isinstance(row.get("capture"), float)]
    return {
        "denoisers": len({row["denoiser"] for row in right}),
        "classes": len({row.get("pipeline") for row in right}),
        "capture": len(right),
        "vico": sum(row.get("vico") == "yes" for row in rows),
        "rows": len(rows),
    }


def page(table: dict[str, Any]) -> str:
    """The page of a table."""
    number = counts(table)
    lines = [
        "# Which pipelines work",
        "",
        "Written by the tests' own run (`make coverage`), never by hand; the tests fail where it is no longer true. "
        "Every row is a tiny pipeline of random weights out of diffusers' real classes (`tests/pipelines`), measured"
        " against eager PyTorch (`tests/coverage`).",
        "",
        f"Capture is right on {number['capture']} of {number['rows']} pipelines ({number['classes']} pipeline classes "
        f"of {number['denoisers']} denoisers); a step guided by Vico on {number['vico']}.",
        "",
        *(f"- **{heading}**: {meaning}" for heading, meaning in COLUMNS.values()),
        "",
    ]
    used = [c for c in COLUMNS if any(row.get(c) is not None for row in table["rows"].values())]
    lines += ["| denoiser | pipeline | " + " | ".join(COLUMNS[c][0] for c in used) + " |"]
    lines += ["| --- " * (len(used) + 2) + "|"]
    rows = sorted(table["rows"].items(), key=lambda pair: pair[1]["denoiser"])
    for name, row in rows:
        cells = [row["denoiser"], f"{row.get('pipeline', '')} (`{name}`)"]
        lines.append("| " + " | ".join([*cells, *(_cell(row.get(c)) for c in used)]) + " |")
    lines += ["", "Without maps of words:", ""]
    lines += [f"- `{name}`: {row['why']}" for name, row in rows if "why" in row]
    lines.append("")
    lines += _refused(table)
    lines += ["## Left out", "", "| of diffusers | why |", "| --- | --- |"]
    lines += [f"| {name} | {why} |" for name, why in table["left_out"].items()]
    return "\n".join(lines) + "\n"


def _refused(table: dict[str, Any]) -> list[str]:
    """What methods say where they cannot guide."""
    where: dict[tuple[str, str], list[str]] = {}
    for name, row in table["rows"].items():
        for column, message in row.get("refused", {}).items():
            where.setdefault((COLUMNS[column][0], message), []).append(f"`{name}`")
    lines = ["## Refused", "", "| method | what it says | where |", "| --- | --- | --- |"]
    lines += [f"| {method} | {message} | {', '.join(names)} |" for (method, message), names in sorted(where.items())]
    return [*lines, ""]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"≤ {value:.0e}".replace("e-0", "e-")
    return str(value)
