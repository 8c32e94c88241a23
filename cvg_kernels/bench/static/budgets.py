"""The committed table of what compilers made of the kernels, and the comparison that lets it only improve.

The table is a JSON file as `cvg-kernels bench --static --json` writes it: the versions of the compilers, and a row per
kernel. Figures of other compilers cannot be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from cvg_kernels.bench.static.compiled import StaticRow
from cvg_kernels.bench.static.objects import ObjectRow
from cvg_kernels.writing import write_text

#: Where the tables lie in the repository: of Triton's kernels, and of the CUDA module.
TABLE = Path("benchmarks/static_budgets.json")
OBJECTS_TABLE = Path("benchmarks/cuda_budgets.json")
REWRITE = f"cvg-kernels bench --static --json {TABLE}"
REWRITE_OBJECTS = f"cvg-kernels bench --static --objects --json {OBJECTS_TABLE}"
_KEY = ("target", "variant", "dtype", "kernel")
_OBJECTS_KEY = ("target", "kernel")
_OBJECTS_AT_MOST = ("registers", "stack_bytes", "shared_bytes")
#: Figures of a kernel that may not grow, and that may not fall.
_AT_MOST = ("registers", "spills", "shared_bytes", "narrow_loads", "repeated")
_AT_LEAST = ("resident", "fill", "specialised")
#: Likewise of a loop.
_LOOP_AT_MOST = ("per_element", "instructions", "narrow_loads", "local", "repeated")
_LOOP_AT_LEAST = ("fraction", "async_copies")


class Comparison(NamedTuple):
    """What changed against the table, a line each.

    Attributes:
        worse: a figure that is worse than the table allows.
        better: a figure that has improved.
        unknown: kernels that only one side has.
    """

    worse: list[str]
    better: list[str]
    unknown: list[str]


def compilers() -> dict[str, str]:
    """Versions of what the figures depend on."""
    import triton

    return {"triton": triton.__version__}


def write(path: Path, rows: list[StaticRow] | list[ObjectRow], versions: dict[str, str]) -> None:
    """Writes a table, one row a line, sorted, so that a change shows as the lines it changes.

    Args:
        path: path of the file.
        rows: as `collect` or `module_rows` return them.
        versions: versions of the compilers.
    """
    key = _KEY if rows and isinstance(rows[0], StaticRow) else _OBJECTS_KEY
    plain = [asdict(row) for row in rows]
    lines = sorted(json.dumps({name: row[name] for name in key} | row) for row in plain)
    head = json.dumps(versions)
    write_text(
        path,
        f'{{"compilers": {head},\n "figures": "of the compiler; fraction is modelled, not measured",\n'
        f' "rows": [\n' + ",\n".join(lines) + "\n]}\n",
    )


def compare(present: Iterable[dict], committed: Iterable[dict]) -> Comparison:
    """Compares two tables' rows, figure by figure.

    Args:
        present: what the compiler makes now.
        committed: what the table has.
    """
    now, then = _by_key(present, _KEY), _by_key(committed, _KEY)
    result = Comparison([], [], [])
    for key in sorted(now.keys() ^ then.keys()):
        result.unknown.append(_missing(_name(key), here=key in now))
    for key in sorted(now.keys() & then.keys()):
        _compare_figures(result, _name(key), now[key], then[key], _AT_MOST, _AT_LEAST)
        loops, old_loops = now[key]["loops"], then[key]["loops"]
        if len(loops) != len(old_loops):  # laid out anew: the worst stands for all
            loops, old_loops = [_worst(loops)], [_worst(old_loops)]
        for number, (loop, old) in enumerate(zip(loops, old_loops, strict=True)):
            name = f"{_name(key)}, loop {number}"
            _compare_figures(result, name, loop, old, _LOOP_AT_MOST, _LOOP_AT_LEAST)
    return result


def compare_objects(present: Iterable[dict], committed: Iterable[dict]) -> Comparison:
    """Compares what nvcc made of the CUDA kernels, for the GPUs that both sides were built for.

    Args:
        present: rows of the built module.
        committed: what the table has.
    """
    now, then = _by_key(present, _OBJECTS_KEY), _by_key(committed, _OBJECTS_KEY)
    targets = {target for target, _ in now} & {target for target, _ in then}
    result = Comparison([], [], [])
    for key in sorted(now.keys() | then.keys()):
        if key[0] not in targets:
            continue
        name = f"{key[1]} on {key[0]}"
        if key in now and key in then:
            _compare_figures(result, name, now[key], then[key], _OBJECTS_AT_MOST, ())
        else:
            result.unknown.append(_missing(name, here=key in now))
    return result


def _by_key(rows: Iterable[dict], key: tuple[str, ...]) -> dict[tuple[str, ...], dict]:
    return {tuple(row[name] for name in key): row for row in rows}


def _missing(name: str, *, here: bool) -> str:
    """The line about a kernel that only one side has; `here`: it is the compiler's side."""
    return f"{'the table lacks' if here else 'only the table has'} {name}"


def _name(key: tuple[str, ...]) -> str:
    target, variant, dtype, kernel = key
    return f"{kernel} of {variant} in {dtype} on {target}"


def _worst(loops: list[dict]) -> dict[str, Any]:
    """The worst figure of some loops, each; `None` where none has one."""

    def worst(name: str, choose) -> Any:
        values = [loop[name] for loop in loops if loop[name] is not None]
        return choose(values) if values else None

    return {name: worst(name, max) for name in _LOOP_AT_MOST} | {name: worst(name, min) for name in _LOOP_AT_LEAST}


def _compare_figures(
    result: Comparison, name: str, now: dict, then: dict, at_most: tuple[str, ...], at_least: tuple[str, ...]
) -> None:
    for figure in (*at_most, *at_least):
        is_now, was = now[figure], then[figure]
        if is_now == was:
            continue
        line = f"{name}: {figure} was {was}, is {is_now}"
        if is_now is None or was is None or (is_now > was) == (figure in at_most):
            result.worse.append(line)
        else:
            result.better.append(line)
