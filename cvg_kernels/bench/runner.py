"""A benchmark from its first case to its last: what all modules of this folder have in common.

A module that measures an operation has

    ROUNDS                                          timed rounds on a CPU and on a GPU
    KIND                                            what its cases are called in the report
    cases(device, quick)                            what to measure; quick: something tiny, to see that all works
    measure(case, device, dtype, rounds) -> dict    the figures of one case; AssertionError for a wrong result
    show(figures, report)                           prints them

and may have

    once(device, dtype) -> dict                     figures of the report that belong to no case, which it prints
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cvg_kernels.bench.harness import machine, peak_flops
from cvg_kernels.writing import write_json


def run(
    benchmark: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    *,
    quick: bool = False,
    rounds: int | None = None,
    path: Path | None = None,
) -> dict[str, Any]:
    """Measures all cases, printing each and writing the file as it goes.

    Args:
        benchmark: a module as above.
        device: where.
        dtype: dtype of the inputs.
        quick: tiny cases.
        rounds: timed rounds; `None` is what the module says.
        path: JSON file to write, or `None`.
    """
    rounds = rounds or benchmark.ROUNDS["cpu" if device.type == "cpu" else "gpu"]
    name = benchmark.__name__.rpartition(".")[2]
    report = {"benchmark": name, **machine(device), "rounds": rounds}
    report["matrix_product_flops"] = peak_flops(device, dtype)
    if hasattr(benchmark, "once"):
        report |= benchmark.once(device, dtype)
    report[benchmark.KIND] = []
    for case in benchmark.cases(device, quick):
        figures = benchmark.measure(case, device, dtype, rounds)
        report[benchmark.KIND].append(figures)
        benchmark.show(figures, report)
        if path is not None:
            write_json(path, report)  # who ends this now finds the file before it, or this one
    return report
