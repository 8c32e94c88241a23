"""The benchmarks of a result of `make gpu` as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator

#: What in the figures of a case is arm → seconds, or form → arm → seconds.
_TIMES = (
    *(f"{kind}{form}" for kind in ("forward", "forward_backward", "scores") for form in ("", "_graph")),
    "seconds",
)


def tables(facts: dict) -> Iterator[str]:
    """The lines of all tables: one a benchmark, a row for each case and each thing measured, a column for each arm."""
    for step, result in facts.items():
        found = result.get("measured") if isinstance(result, dict) else None
        if not isinstance(found, dict) or not step.startswith("benchmark of "):
            continue
        cases = [case for value in found.values() if isinstance(value, list) for case in value]
        rows = [row for case in cases for row in _rows(case)]
        if rows:
            yield from _table(step.removeprefix("benchmark of "), facts, rows)


def _rows(case: object) -> Iterator[tuple[str, dict]]:
    """What of a case is a time of several arms, in seconds, with its name."""
    if not isinstance(case, dict):
        return
    shape = case.get("shape", {})
    words = [shape.get("name"), *(case.get(key) for key in ("form", "frames", "sink", "kind"))]
    name = ", ".join(str(word) for word in words if word is not None)
    for what, figures in case.items():
        if what not in _TIMES:
            continue
        label = ", ".join(filter(None, (name, what.replace("_", " ") if what != "seconds" else "")))
        nested = any(isinstance(value, dict) for value in figures.values())
        for form, arms in figures.items() if nested else [("", figures)]:
            yield ", ".join(filter(None, (label, form))), arms


def _table(title: str, facts: dict, rows: list[tuple[str, dict]]) -> Iterator[str]:
    arms = list(dict.fromkeys(arm for _, times in rows for arm in times))
    yield f"\n### {title}, {facts['device']}, torch {facts['torch']}, milliseconds\n"
    yield f"| | {' | '.join(arms)} |"
    yield f"| --- |{' ---: |' * len(arms)}"
    for name, times in rows:
        cells = (_cell(times.get(arm)) for arm in arms)
        yield f"| {name} | {' | '.join(cells)} |"


def _cell(took: float | str | None) -> str:
    if took is None:
        return ""
    return "–" if isinstance(took, str) else f"{took * 1e3:.4g}"
