"""Every Triton kernel in use, compiled for GPUs that are not here, and the rules and budgets that its code must keep."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from cvg_kernels.bench.static import budgets, cases  # noqa: E402
from cvg_kernels.bench.static.compiled import TARGETS  # noqa: E402
from cvg_kernels.bench.static.model import AMD_SHARED, ARCHITECTURES  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """The covering set, compiled once however many processes test; in a process of its own, since interpreted kernels
    cannot be compiled."""
    folder: Path = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "static.json"
    with (folder / "static.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            ended = subprocess.run(
                [sys.executable, "-m", "cvg_kernels", "bench", "--static", "--json", str(path)],
                env=environment,
                capture_output=True,
                text=True,
            )
            assert ended.returncode == 0, ended.stderr
    return json.loads(path.read_text())["rows"]


def _told(rows: list[dict], *figures: str) -> str:
    """Rows as lines of a message."""
    lines = [
        f"{row['kernel']} of {row['variant']} in {row['dtype']} on {row['target']}: "
        + ", ".join(f"{name} {row[name]}" for name in figures)
        for row in rows
    ]
    return "\n".join(["", *lines])


def _attention(row: dict) -> bool:
    """Whether it is a kernel of attention with capture or with a band on 16-bit numbers."""
    return row["dtype"] != "float32" and any(loop["fraction"] for loop in row["loops"])


def test_every_kernel_compiles(rows):
    compiled = {(row["variant"], row["dtype"], row["target"]) for row in rows}
    assert compiled == {(v.name, v.dtype, target) for v, target, _ in cases.covering()}
    assert {row["target"] for row in rows} == set(TARGETS)


def test_shared_memory_within_the_limit_of_the_card(rows):
    limits = {name: card.block_shared for name, card in ARCHITECTURES.items()} | AMD_SHARED
    over = [row for row in rows if row["shared_bytes"] > limits[row["target"]]]
    assert not over, _told(over, "shared_bytes")


def test_no_spilled_registers(rows):
    spilling = [row for row in rows if row["spills"]]
    assert not spilling, _told(spilling, "spills", "registers")


def test_asynchronous_copies_in_every_attention_loop(rows):
    """The next tile is fetched while this one is computed; the captured tokens do not stand in the way."""
    checked, without = 0, []
    for row in filter(_attention, rows):
        for loop in row["loops"]:
            if loop["of"] not in (None, "tokens"):
                checked += 1
                if not loop["async_copies"] and not row["specialised"]:
                    without.append(row)
    assert checked > 50 and not without, _told(without, "stages", "shared_bytes")


def test_no_loads_of_two_bytes(rows):
    """Every head_dim here divides by 8, and diffusers' layouts do: 16 bytes at a time."""
    attention = [row for row in rows if _attention(row)]
    narrow = [row for row in attention if row["narrow_loads"]]
    assert attention and not narrow, _told(narrow, "narrow_loads")


def test_no_product_is_computed_twice(rows):
    twice = [row for row in rows if row["target"] in ARCHITECTURES and row["repeated"] != 1]
    twice += [
        row
        for row in rows
        if any(loop["repeated"] not in (None, 1.0) for loop in row["loops"]) and row not in twice
    ]
    assert not twice, _told(twice, "repeated", "warps")


def test_wgmma_on_sm_90(rows):
    """The products of the attention kernels are Hopper's warp-group products for head_dim 64 and 128 in 16 bit."""
    names = {v.name for v, _, _ in cases.covering() if getattr(v, "dim", 0) in (64, 128)}
    checked = [
        row
        for row in rows
        if row["target"] == "sm_90" and row["variant"] in names and _attention(row)
    ]
    without = [row for row in checked if not row["wgmma"] or row["mma"]]
    assert len(checked) >= 15 and not without, _told(without, "wgmma", "mma")


def test_matrix_cores_elsewhere(rows):
    without = [
        row for row in rows if row["dtype"] != "float32" and not row["mma"] and not row["wgmma"]
    ]
    assert not without, _told(without, "mma")


def test_specialised_warps_are_specialised(rows):
    """A kernel that asks for warps with parts of their own gets them: the compiler may drop that without a word."""
    asked = [row for row in rows if "warp_specialize" in row["kernel"]]
    without = [row for row in asked if row["target"] == "sm_90" and not row["specialised"]]
    assert not without, _told(without, "warps")


def test_figures_are_no_worse_than_the_table(rows):
    table = json.loads((ROOT / budgets.TABLE).read_text())
    if table["compilers"] != budgets.compilers():
        pytest.skip(f"the table is of {table['compilers']}, installed is {budgets.compilers()}")
    worse, better, unknown = budgets.compare(rows, table["rows"])
    if better:
        print(f"{len(better)} figures are better; keep them: {budgets.REWRITE}", *better, sep="\n")
    told = [*worse, *unknown]
    assert not told, "\n".join(["", *told, f"if that is meant: {budgets.REWRITE}"])
