"""What nvcc made of the CUDA kernels, where they were built: no worse than the committed table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("triton")

from cvg_kernels.bench.static import budgets, objects  # noqa: E402


def test_registers_and_stack_are_no_worse_than_the_table():
    module = objects.built_module()
    if module is None:
        pytest.skip("the CUDA module was not built")
    path = Path(__file__).parents[2] / budgets.OBJECTS_TABLE
    if not path.exists():
        pytest.skip(f"there is no table yet: {budgets.REWRITE_OBJECTS}")
    table = json.loads(path.read_text())
    versions = {"nvcc": objects.compiler(module)}
    if table["compilers"] != versions:
        pytest.skip(f"the table is of {table['compilers']}, the module of {versions}")
    present = [asdict(row) for row in objects.module_rows(module)]
    worse, better, unknown = budgets.compare_objects(present, table["rows"])
    if better:
        print(f"{len(better)} figures are better; keep them: {budgets.REWRITE_OBJECTS}", *better, sep="\n")
    told = [*worse, *unknown]
    assert not told, "\n".join(["", *told, f"if that is meant: {budgets.REWRITE_OBJECTS}"])
