"""`cvg-kernels shapes sweep`: what one option of a guidance method does to two-object prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.methods import method_named
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.shapes.evaluation import evaluate


def sweep(
    pipe: VideoPipeline,
    method: str,
    option: str,
    values: Sequence[float],
    *,
    progress: Callable[[str, int], None] = lambda name, done: None,
    **settings: Any,
) -> dict[str, Any]:
    """Scores a method at several values of an option, on the same prompts and seeds.

    Args:
        pipe: the shapes pipeline.
        method: as `method_named` takes it, other options included; of methods joined by a plus, the option is the
            last's.
        option: an attribute of the method that is a number.
        values: values of the option, the one that the others are compared with first.
        progress: called with the method's specification and number of clips made.
        **settings: `model`, `prompts`, `seed`, and options of `pipeline.sample`; see `evaluate`.

    Returns:
        What `evaluate` returns, a method a value, and `method`, `option`, `values`.

    Raises:
        ArgumentError: for an unknown method or option, or a value that it does not take.
    """
    methods = {spec: method_named(spec) for spec in specifications(method, option, values)}
    report = evaluate(pipe, methods, progress=progress, **settings)
    guidance = report.pop("guidance")
    return report | {"method": method, "option": option, "values": list(values), "guidance": guidance}


def specifications(method: str, option: str, values: Sequence[float]) -> list[str]:
    """What `method_named` takes, a value each.

    Raises:
        ArgumentError: if a value comes twice.
    """
    if len(set(values)) < len(values):
        raise ArgumentError(f"values must differ, got {', '.join(map(str, values))}")
    return [f"{method}:{option}={value}" for value in values]


def numbers(text: str) -> list[float]:
    """Reads numbers separated by commas; those without a point are integers.

    Raises:
        ArgumentError: for anything else.
    """
    found = []
    for part in text.split(","):
        try:
            found.append(float(part) if set(part) & set(".eE") else int(part))
        except ValueError:
            raise ArgumentError(f"values must be numbers separated by commas, got {text!r}") from None
    return found
