"""A part of the generated calls, the same in every run; and that the machinery which makes and judges them sees
faults.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

import cvg_kernels as cvg
from tests.fuzz import __main__ as command
from tests.fuzz import exactness, numbers
from tests.fuzz.call import Call, Operation
from tests.fuzz.cases import LAYOUTS, Case, Range, draw
from tests.fuzz.operations import OPERATIONS
from tests.fuzz.oracle import Failure, Figure, Outcome, examine
from tests.fuzz.shrink import shrunk
from tests.fuzz.tensors import Maker
from tests.ops.backends import backends

PARTS = [
    pytest.param(name, calls, marks=parameter.marks)
    for name, calls in (("native", 100), ("reference", 40), ("triton", 6))
    for parameter in backends("attention", name)
]


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("backend,calls", PARTS)
def test_generated_calls(backend, calls, one_thread, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    # Another processor adds in another order, for which nobody chose these calls.
    monkeypatch.setattr(exactness, "LENIENCY", 4.0)
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("generated calls are made on the CPU")
    for number in range(calls):
        case = draw(1, number, backend, OPERATIONS)
        try:
            examine(case)
        except Failure as failure:
            pytest.fail(f"{failure}\n{case.code()}")


# --- what the oracle sees --------------------------------------------------------------------------------------------


def planted(monkeypatch, kernel) -> Case:
    """A call of an operation whose kernel is `kernel`, and whose reference doubles its input."""

    def double(x, flag=None, backend="auto"):
        if flag is not None:
            raise cvg.ArgumentError("flag must be None")
        return 2 * x if backend == "reference" else kernel(x)

    def build(case: Case, make: Maker) -> Call:
        return Call(double, {"x": make.tensor(case.sizes["size"])}, ("x",))

    operation = Operation(build, {"size": Range(1, 9, 9)}, {}, ("float32",))
    monkeypatch.setitem(OPERATIONS, "double", operation)
    return Case("double", "native", sizes={"size": 7})


def test_what_is_right_passes(monkeypatch):
    case = planted(monkeypatch, lambda x: x + x)
    for seed in range(20):
        for layout in LAYOUTS:
            examine(case.changed(seed=seed, layout=layout))


@pytest.mark.parametrize(
    "kernel,says",
    [
        (lambda x: x * 2.00001, "is off by"),
        (lambda x: (x + x).index_fill(0, torch.tensor([3]), torch.nan), "not finite"),
        (lambda x: (x + x).double(), "torch.float64"),
        (lambda x: (x + x)[:-1], r"\(6,\)"),
        (lambda x: {}["key"], "KeyError that is none of ours"),
        (lambda x: x.mul_(2), "x was written to"),
        (lambda x: (_ for _ in ()).throw(cvg.ArgumentError("no")), "refused, though it fits"),
    ],
    ids=["wrong", "nan", "dtype", "shape", "exception", "input", "refusal"],
)
def test_a_fault_is_seen(monkeypatch, kernel, says):
    with pytest.raises(Failure, match=says):
        for seed in range(10):
            examine(planted(monkeypatch, kernel).changed(seed=seed))


def in_the_package(code: str):
    """A kernel that allocates as code of the package does."""
    found = {"__name__": "cvg_kernels.planted", "torch": torch, "ctypes": ctypes}
    exec(f"def kernel(x):\n out = torch.empty_like(x)\n {code}\n return out", found)
    return found["kernel"]


@pytest.mark.parametrize(
    "code,says",
    [
        ("out[1:] = 2 * x[1:]", "not finite where it should be"),
        ("out.copy_(2 * x); ctypes.memset(out.data_ptr() + 4 * out.numel(), 0, 4)", "behind"),
        ("out.copy_(2 * x); ctypes.memset(out.data_ptr() - 8, 1, 4)", "before"),
    ],
    ids=["unwritten", "behind", "before"],
)
def test_memory_is_watched(monkeypatch, code, says):
    with pytest.raises(Failure, match=says):
        examine(planted(monkeypatch, in_the_package(code)))


def test_a_gradient_that_is_wrong_is_seen(monkeypatch):
    def kernel(x):
        return 2 * x.detach() + (x - x.detach()) * 2.001

    with pytest.raises(Failure, match="grad x is off by"):
        for seed in range(20):
            examine(planted(monkeypatch, kernel).changed(seed=seed))


# --- the machinery ---------------------------------------------------------------------------------------------------


def test_a_number_is_a_call_and_its_code_repeats_it():
    for backend in ("native", "triton", "reference"):
        for number in range(200):
            case = draw(3, number, backend, OPERATIONS)
            assert case == draw(3, number, backend, OPERATIONS)
            shown = case.code().splitlines()[-1]
            assert eval(shown, {"Case": Case, "examine": lambda given: given}) == case


def test_shrinking():
    case = next(
        found
        for number in range(10_000)
        if (found := draw(5, number, "native", OPERATIONS)).operation == "temporal_maps"
        and found.sizes["frames"] > 5
        and found.layout == "sliced"
        and found.options["mask"] == "bool"
    )
    small = shrunk(
        case, OPERATIONS, lambda c: c.sizes["frames"] >= 5 and c.layout == "sliced" and c.options["mask"] == "bool"
    )
    assert small.sizes["frames"] == 5 and small.layout == "sliced"
    assert {size for name, size in small.sizes.items() if name != "frames"} <= {1}
    assert small.options["mask"] == "bool" and not small.options["lse"] and small.values == "normal"


def test_a_process_that_dies_names_its_call(monkeypatch):
    """The one that died counts as made, and the next process goes on behind it."""
    asked = []

    def die(given, **options):
        first, folder = int(given[5]), command.Path(given[8])
        asked.append(first)
        (folder / "at").write_text(f"{first + 3:12d}")
        return SimpleNamespace(returncode=-11, stderr="Fatal Python error: Segmentation fault")

    monkeypatch.setattr(subprocess, "run", die)
    run = command.Run(1, "native")
    run.make(10, 60)
    assert asked == [0, 4, 8] and sorted(run.failures) == [3, 7, 11]
    assert "Segmentation fault" in run.failures[3]


def test_the_largest_share_is_kept():
    one, other = numbers.Numbers(), numbers.Numbers()
    case = Case("max_flow", "native")
    for number, error in enumerate((1.0, 3.0, 2.0)):
        one.note(case, number, Outcome(figures={"flow": Figure(error, 10.0)}))
    other.note(case, 9, Outcome(figures={"flow": Figure(2.5, 5.0)}))
    one.add(json.loads(json.dumps(other.lines())))
    kind = ("native", "max_flow", "flow", "float32")
    assert one.kinds[kind] == (0.5, 2.5, 9) and one.compared[kind] == 4


def test_the_page_is_that_of_the_numbers():
    found = json.loads((numbers._DOCS / "accuracy.json").read_text())
    assert (numbers._DOCS / "accuracy.md").read_text() == numbers.page(found)
    assert all(row["share"] <= 1 for row in found["rows"])
    there = {row["operation"] for row in found["rows"] if row["backend"] == "native"}
    assert there == {name for name, op in OPERATIONS.items() if "native" in op.backends}


# --- runs that are kept and added up ---------------------------------------------------------------------------------


class Calls:
    """In the place of the processes: makes no call; those in `wrong` fail."""

    def __init__(self, *wrong: int) -> None:
        self.wrong, self.asked = wrong, []

    def __call__(self, given, **options):
        first, calls, folder = int(given[5]), int(given[6]), command.Path(given[8])
        self.asked.append((first, calls))
        made = range(first, first + calls)
        lines = [{"kind": "failure", "number": n, "says": "is off"} for n in made if n in self.wrong]
        found = [["native", "max_flow", "flow", "float32", n / 100, 1e-7, n, 1] for n in made]
        kept = numbers.Numbers()
        kept.add(found)
        lines.append({"kind": "end", "made": calls, "numbers": kept.lines()})
        (folder / "found.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return SimpleNamespace(returncode=0, stderr="")


def called(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["fuzz", "--backends", "native", "--seed", "7", *map(str, arguments)])
    monkeypatch.setattr(command, "report", lambda run: None)
    monkeypatch.setattr(command.worker, "prepare", lambda: None)
    return command.main()


def test_a_kept_run_goes_on_and_makes_failed_calls_again(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_BATCH", 10)
    monkeypatch.setattr(numbers, "_DOCS", tmp_path)
    keep = ["--keep", tmp_path / "run.json", "--write"]
    monkeypatch.setattr(subprocess, "run", calls := Calls(3, 14))
    assert called(monkeypatch, *keep, "--calls", 20) == 1
    assert calls.asked == [(0, 10), (10, 10)] and not (tmp_path / "accuracy.json").exists()
    monkeypatch.setattr(subprocess, "run", calls := Calls(14))
    assert called(monkeypatch, *keep, "--calls", 25) == 1
    assert calls.asked == [(3, 1), (14, 1), (20, 5)]
    monkeypatch.setattr(subprocess, "run", calls := Calls())
    assert called(monkeypatch, *keep, "--calls", 25) == 0 and calls.asked == [(14, 1)]
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert found["runs"] == [{"backend": "native", "seed": 7, "first": 0, "calls": 25}]
    assert found["rows"][0]["share"] == 0.24 and (tmp_path / "accuracy.md").read_text() == numbers.page(found)


def test_runs_are_added_up(monkeypatch, tmp_path):
    monkeypatch.setattr(numbers, "_DOCS", tmp_path)
    monkeypatch.setattr(subprocess, "run", Calls())
    assert called(monkeypatch, "--calls", 20, "--first", 30, "--write") == 0
    assert called(monkeypatch, "--calls", 30, "--write") == 0
    with pytest.raises(ValueError, match="has calls of these already"):
        called(monkeypatch, "--calls", 5, "--first", 49, "--write")
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert [(run["first"], run["calls"]) for run in found["runs"]] == [(0, 30), (30, 20)]
    (row,) = found["rows"]
    assert (row["share"], row["call"], row["seed"], row["compared"]) == (0.49, 49, 7, 50)
    assert "| **`native`** | **50** | in all |" in numbers.page(found)
    assert called(monkeypatch, "--calls", 10, "--write", "--anew") == 0
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert [run["calls"] for run in found["runs"]] == [10] and found["rows"][0]["compared"] == 10
