"""Every Triton kernel in use, compiled for GPUs that are not here,
and the rules and budgets that its code must keep.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")

from cvg_kernels.bench.static import budgets, cases  # noqa: E402
from cvg_kernels.bench.static.compiled import TARGETS  # noqa: E402
from cvg_kernels.bench.static.model import AMD_SHARED, ARCHITECTURES  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory, pytestconfig) -> list[dict]:
    """The covering set on one GPU, drawn anew, or on all (`tests.drawn`), compiled once however many processes test;
    in a process of its own, since interpreted kernels cannot be compiled."""
    folder: Path = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "static.json"
    with (folder / "static.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            taken = [random.Random(pytestconfig.seed).choice(TARGETS)] if pytestconfig.draws else TARGETS
            command = ["bench", "--static", "--targets", ",".join(taken), "--json", str(path)]
            ended = subprocess.run(
                [sys.executable, "-m", "cvg_kernels", *command], env=environment, capture_output=True, text=True
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


@pytest.mark.drawn(8, of="long tests")
def test_every_kernel_compiles(rows, pytestconfig):
    compiled = {(row["variant"], row["dtype"], row["target"]) for row in rows}
    targets = {row["target"] for row in rows}
    assert targets <= set(TARGETS)
    assert len(targets) == (1 if pytestconfig.draws else len(TARGETS))
    wanted = {(v.name, v.dtype, target) for v, target, _ in cases.covering()}
    assert compiled == {one for one in wanted if one[2] in targets}


class Exempt(NamedTuple):
    """Kernels that break a rule and are known to; an entry that nothing needs any more fails."""

    rule: str
    kernel: str  #: as are the next two, a pattern of `fnmatch`
    variant: str
    target: str
    reason: str


_LARGE = "above 128, two tiles of keys on the way leave too few registers or too little shared memory"
_FEW = "a handful, outside the loop over keys"
_AMD = "no tile is made for the 64 KB of AMD"

EXEMPT = (
    *(Exempt("copies", "forward_kernel*", f"D {dim},*", "*", _LARGE) for dim in (160, 256)),
    Exempt("copies", "*_kernel*", "head_dim 256", "sm_90", _LARGE),
    *(
        Exempt("twice", "forward_kernel*", f"D {dim},*", "sm_[81]*", "some warps lie along the columns")
        for dim in (160, 256)
    ),
    Exempt("twice", "temporal_backward_kernel*need_added*", "*64 frames", "sm_90", "band gradient only"),
    *(Exempt("spills", "row_kernel*", f"D {dim},*", "sm_120", _FEW) for dim in (72, 88, 128)),
    Exempt("spills", "row_kernel*", "D 128,*", "sm_80", _FEW),
    Exempt("spills", "row_kernel*", "D 160,*", "sm_90", _FEW),
    Exempt("spills", "row_kernel*", "D 160,*", "gfx942", _AMD),
    Exempt("spills", "row_kernel*", "VideoCrafter2 cross", "sm_90", "four, in float32"),
    Exempt("spills", "forward_kernel*", "D 160,*", "sm_80", "two, outside the loop"),
    Exempt("spills", "flow_gradient_kernel (soft)", "*", "sm_90", "two"),
    Exempt("spills", "add_parts_kernel (add_tokens)", "head_dim 256", "sm_90", "a kernel of bytes"),
    *(Exempt("shared", "forward_kernel*", f"D {dim},*", "gfx942", _AMD) for dim in (72, 80, 128)),
)


def _some(chosen: list[dict], rows: list[dict]) -> list[dict]:
    """The rows that a rule is for; the one GPU that was drawn may have none."""
    if not chosen and len({row["target"] for row in rows}) == 1:
        pytest.skip("nothing of this on the GPU that was drawn (--all takes all)")
    return chosen


def _held(rule: str, rows: list[dict], broken: Callable[[dict], bool], *figures: str) -> None:
    """Asserts that no row breaks a rule unless it is exempt, and that every exemption of the rule is needed.

    Whether one is needed is known where all targets that it is for were compiled.
    """

    def covers(exempt: Exempt, row: dict) -> bool:
        return all(fnmatch(row[name], getattr(exempt, name)) for name in ("kernel", "variant", "target"))

    assert rows
    exemptions = [exempt for exempt in EXEMPT if exempt.rule == rule]
    breaking = [row for row in rows if broken(row)]
    left = [row for row in breaking if not any(covers(exempt, row) for exempt in exemptions)]
    assert not left, _told(left, *figures)
    targets = {row["target"] for row in rows}
    known = [e for e in exemptions if {target for target in TARGETS if fnmatch(target, e.target)} <= targets]
    idle = [e for e in known if not any(covers(e, row) for row in breaking)]
    assert not idle, f"no longer needed: {idle}"


def test_shared_memory_within_the_limit_of_the_card(rows):
    limits = {name: card.block_shared for name, card in ARCHITECTURES.items()} | AMD_SHARED
    _held("shared", rows, lambda row: row["shared_bytes"] > limits[row["target"]], "shared_bytes")


def test_no_spilled_registers(rows):
    _held("spills", rows, lambda row: row["spills"] > 0, "spills", "registers")


def test_asynchronous_copies_in_every_attention_loop(rows):
    """The next tile is fetched while this one is computed; the captured tokens do not stand in the way."""

    def broken(row: dict) -> bool:
        loops = [loop for loop in row["loops"] if loop["of"] not in (None, "tokens")]
        return any(not loop["async_copies"] for loop in loops) and not row["specialised"]

    _held("copies", _some(list(filter(_attention, rows)), rows), broken, "stages", "shared_bytes")


def test_no_loads_of_two_bytes(rows):
    """Every head_dim here divides by 8, and diffusers' layouts do: 16 bytes at a time."""
    attention = _some(list(filter(_attention, rows)), rows)
    _held("narrow", attention, lambda row: row["narrow_loads"] > 0, "narrow_loads")


def test_no_product_is_computed_twice(rows):
    """By the count of what loops over keys, queries or heads execute;
    without such a loop, by the layout of the warps.
    """

    def broken(row: dict) -> bool:
        loops = [loop["repeated"] for loop in row["loops"] if loop["of"] not in (None, "tokens")]
        return any(repeated > 1 for repeated in loops or [row["repeated"]])

    nvidia = [r for r in rows if r["target"] in ARCHITECTURES and r["dtype"] != "float32"]
    _held("twice", _some(nvidia, rows), broken, "repeated", "warps")


def test_wgmma_on_sm_90(rows):
    """The products of the attention kernels are Hopper's warp-group products for head_dim 64 and 128 in 16 bit."""
    names = {v.name for v, _, _ in cases.covering() if getattr(v, "dim", 0) in (64, 128)}
    checked = [row for row in rows if row["target"] == "sm_90" and row["variant"] in names and _attention(row)]
    assert len(_some(checked, rows)) >= 15
    _held("wgmma", checked, lambda row: not row["wgmma"], "wgmma", "mma")


def test_matrix_cores_elsewhere(rows):
    products = [row for row in rows if _attention(row) or row["kernel"].startswith(("temporal", "maps"))]
    products = [row for row in products if row["dtype"] != "float32"]
    _held("matrix", products, lambda row: not row["mma"] and not row["wgmma"], "mma")


def test_figures_are_no_worse_than_the_table(rows):
    table = json.loads((ROOT / budgets.TABLE).read_text())
    if table["compilers"] != budgets.compilers():
        pytest.skip(f"the table is of {table['compilers']}, installed is {budgets.compilers()}")
    targets = {row["target"] for row in rows}
    committed = [row for row in table["rows"] if row["target"] in targets]
    worse, better, unknown = budgets.compare(rows, committed)
    if better:
        print(f"{len(better)} figures are better; keep them: {budgets.REWRITE}", *better, sep="\n")
    told = [*worse, *unknown]
    assert not told, "\n".join(["", *told, f"if that is meant: {budgets.REWRITE}"])
