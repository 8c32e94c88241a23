"""The table of what works on which pipeline: docs/coverage.json, which tests write, and docs/coverage.md, its picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
JSON = DOCS / "coverage.json"
PAGE = DOCS / "coverage.md"

#: Column → its heading and what it says. Numbers are bounds of an error; other columns are "yes", "no" or words.
COLUMNS: dict[str, tuple[str, str]] = {
    "kind": ("attention to text", "as it was seen in the stock run"),
    "capture": (
        "capture",
        "largest difference of a captured map from softmax(q kᵀ), in float64 from the stock run's own queries and keys",
    ),
    "gradient": (
        "gradient",
        "relative difference of the gradient that a loss of the maps has on the latents from that of eager PyTorch",
    ),
    "output": ("output", "largest change of a denoiser's answers by capture, relative to the largest"),
    "swap": ("swap", "the same with `cvg.processors`; no: no layer could be swapped, and that was said"),
    "vico": ("Vico", "a guided step: made, finite, and moving the video"),
    "cvg": ("CVG", "the same, with a classifier of random weights"),
    "vstar": ("VSTAR", "the same, of VSTAR's band"),
    "gen1": ("Gen-1", "the same, of Gen-1's mixing"),
    "compile": ("compile", "maps of a denoiser under `torch.compile`"),
    "context_parallel": ("context parallel", "maps by two processes"),
    "releases": (
        "releases",
        "of diffusers under which capture was run and right ([all that was run there](releases.md))",
    ),
}  # fmt: skip
#: Columns whose values are bounds.
BOUNDS = ("capture", "gradient", "output", "swap")


def read() -> dict[str, Any]:
    """The committed table."""
    return json.loads(JSON.read_text()) if JSON.exists() else {"rows": {}, "left_out": {}}


def agrees(value: Any, committed: Any) -> bool:
    """Whether a value that was measured is the committed one, or within the committed bound."""
    if isinstance(value, float):
        return isinstance(committed, float) and value <= committed
    return value == committed


def settled(value: Any, committed: Any) -> Any:
    """What is written for a measured value: for an error a bound, which changes only where there is a reason."""
    if not isinstance(value, float):
        return value
    if isinstance(committed, float) and committed / 1000 < value <= committed:
        return committed
    # room for what the order of sums makes of it on other machines
    return 10.0 ** math.ceil(math.log10(max(4 * value, 1e-9)))


def write(notes: list[tuple[str, str, Any]]) -> None:
    """Puts what was noted into the table and writes both files.

    Args:
        notes: (row, column, value); a column that nobody noted stays as it is.
    """
    from tests.coverage.facts import LEFT_OUT
    from tests.pipelines import PIPELINES

    before = read()["rows"]
    rows = {
        name: {**before.get(name, {}), "denoiser": case.denoiser}
        for name, case in PIPELINES.items()
    }
    for name, column, value in notes:
        rows[name][column] = settled(value, before.get(name, {}).get(column))
    order = ("pipeline", "denoiser", *COLUMNS, "why")
    rows = {
        name: {key: row[key] for key in order if row.get(key) is not None}
        for name, row in rows.items()
    }
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
        "Written by the tests' own run (`make coverage`), never by hand; the tests fail where it is no longer true. Every"
        " row is a tiny pipeline of random weights out of diffusers' real classes (`tests/pipelines`), measured"
        " against eager PyTorch (`tests/coverage`).",
        "",
        f"Capture is right on {number['capture']} of {number['rows']} pipelines ({number['classes']} pipeline classes of "
        f"{number['denoisers']} denoisers); a step guided by Vico on {number['vico']}.",
        "",
        *(f"- **{heading}**: {meaning}" for heading, meaning in COLUMNS.values()),
        "",
    ]  # fmt: skip
    by_denoiser: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, row in table["rows"].items():
        by_denoiser.setdefault(row["denoiser"], []).append((name, row))
    used = [c for c in COLUMNS if any(row.get(c) is not None for row in table["rows"].values())]
    for denoiser, rows in sorted(by_denoiser.items()):
        lines += [f"## {denoiser}", ""]
        lines.append("| pipeline | " + " | ".join(COLUMNS[c][0] for c in used) + " |")
        lines.append("| --- " * (len(used) + 1) + "|")
        for name, row in rows:
            cells = [f"{row.get('pipeline', '')} (`{name}`)", *(_cell(row.get(c)) for c in used)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        lines += [f"`{name}`: {row['why']}." for name, row in rows if "why" in row]
        if any("why" in row for _, row in rows):
            lines.append("")
    lines += ["## Left out", "", "| of diffusers | why |", "| --- | --- |"]
    lines += [f"| {name} | {why} |" for name, why in table["left_out"].items()]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"≤ {value:.0e}".replace("e-0", "e-")
    return str(value)
