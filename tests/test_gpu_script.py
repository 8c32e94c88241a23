"""scripts/gpu.py: what it writes down, what it skips by name, and what is kept when it ends early. No GPU is used."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu.py"

SETUP = """
import os
with open("built", "w") as file:
    file.write(os.environ["CVG_BUILD"] + " " + os.environ["CVG_CUDA_ARCHITECTURES"])
"""

TESTS = """
import pytest
@pytest.mark.gpu
def test_right(): pass
@pytest.mark.gpu
def test_absent(): pytest.importorskip("a_package_that_is_nowhere")
def test_of_no_gpu(): assert False
"""

BENCHMARK = """
import json, sys
device, file = sys.argv[sys.argv.index("--device") + 1], sys.argv[sys.argv.index("--json") + 1]
json.dump({"device": device, "ms": 1.5}, open(file, "w"))
"""

#: Racecheck finds something.
SANITIZER = """#!/bin/sh
echo "checked by $2"
[ "$2" != racecheck ] || exit 9
"""


def load_script():
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script on a project of its own, on a machine that seems to have a GPU."""
    module = load_script()
    (tmp_path / "setup.py").write_text(SETUP)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(TESTS)
    (tmp_path / "tests" / "test_no_gpu.py").write_text("raise RuntimeError('nobody need look here')")
    (tmp_path / "bench.py").write_text(BENCHMARK)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    checker = tmp_path / "compute-sanitizer"
    checker.write_text(SANITIZER)
    checker.chmod(0o755)
    monkeypatch.setattr(module, "find_sanitizer", lambda: str(checker))
    (tmp_path / "cvg_kernels" / "cli").mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "BENCHMARKS", {"attention": ["bench.py"]})
    monkeypatch.setattr(module, "device", lambda: ("NVIDIA H100 80GB HBM3", "2.11.0"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path / "results")])
    return module


def result(tmp_path) -> dict:
    (file,) = (tmp_path / "results").glob("nvidia-h100-80gb-hbm3-*.json")
    return json.loads(file.read_text())


@pytest.mark.drawn(8, of="long tests")
def test_builds_tests_measures_and_writes_it_down(script, tmp_path, capfd):
    script.main()
    facts = result(tmp_path)
    assert (tmp_path / "built").read_text() == "cuda native"
    assert facts["build"]["failure"] is None
    assert (facts["tests"]["passed"], facts["tests"]["failed"]) == (1, {})
    assert facts["tests"]["failure"] is None
    ((skipped, reason),) = facts["tests"]["skipped"].items()
    assert skipped.endswith("test_absent") and "a_package_that_is_nowhere" in reason
    assert facts["benchmark of attention"]["measured"] == {"device": "cuda", "ms": 1.5}
    said = capfd.readouterr().out
    assert f"skipped {skipped}" in said
    assert "skipped tune: this version has no" in said
    assert not list((tmp_path / "results").glob("*.parts"))


@pytest.mark.drawn(8, of="long tests")
def test_an_absent_build_package_is_skipped_by_name(script, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(script, "BUILD_PACKAGES", ("setuptools", "a_package_that_is_nowhere"))
    script.main()
    said = "skipped native modules: a_package_that_is_nowhere not installed"
    assert said in capfd.readouterr().out
    assert not (tmp_path / "built").exists()


@pytest.mark.drawn(8, of="long tests")
def test_a_benchmark_without_its_packages_is_skipped_by_name(script, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(script, "NEEDS", {"attention": ("torch", "a_package_that_is_nowhere")})
    script.main()
    said = "skipped benchmark of attention: a_package_that_is_nowhere not installed"
    assert said in capfd.readouterr().out
    assert "measured" not in result(tmp_path)["benchmark of attention"]


@pytest.mark.drawn(8, of="long tests")
def test_failures_are_named_and_the_rest_goes_on(script, tmp_path, capfd):
    (tmp_path / "setup.py").write_text("raise SystemExit(3)")
    (tmp_path / "tests" / "test_gpu.py").write_text(
        TESTS.replace("test_right(): pass", "test_wrong(): print('seed 5'); 1 / 0")
    )
    assert script.main() == 1
    facts = result(tmp_path)
    assert facts["build"]["failure"] == "exit code 3"
    ((failed, why),) = facts["tests"]["failed"].items()
    assert failed.endswith("test_wrong") and "ZeroDivisionError" in why and "seed 5" in why
    assert facts["benchmark of attention"]["failure"] is None
    said = capfd.readouterr().out
    assert "FAILED build: exit code 3" in said
    assert "FAILED tests: 1 failed: tests/test_gpu.py::test_wrong" in said


@pytest.mark.drawn(8, of="long tests")
def test_compute_sanitizer_runs_every_tool(script, tmp_path, capfd):
    assert script.main() == 1
    found = result(tmp_path)["sanitizer"]
    assert {name: tool["exit"] for name, tool in found["tools"].items()} == {
        "memcheck": 0,
        "racecheck": 9,
        "synccheck": 0,
    }
    assert found["tools"]["memcheck"]["output"] == "checked by memcheck\n"
    assert "FAILED sanitizer: racecheck: exit code 9" in capfd.readouterr().out


@pytest.mark.drawn(8, of="long tests")
def test_without_compute_sanitizer_it_says_so(script, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(script, "find_sanitizer", lambda: None)
    assert script.main() == 0
    assert "skipped compute-sanitizer: compute-sanitizer not found" in capfd.readouterr().out


@pytest.mark.drawn(8, of="long tests")
def test_tune_is_called_where_there_is_one(script, tmp_path, capfd):
    package = tmp_path / "cvg_kernels"
    (package / "cli" / "tune.py").touch()
    (package / "__main__.py").write_text(
        "import sys\nif sys.argv[1:3] == ['tune', '--dry-run']:\n    exec(open('bench.py').read())\n"
    )
    script.main()
    assert result(tmp_path)["tune"]["measured"] == {"device": "cuda", "ms": 1.5}
    assert "`cvg-kernels tune --from-results " in capfd.readouterr().out


# --- tests in several processes --------------------------------------------------------------------------------------


def run_tests(script, tmp_path, source: str, processes: int, seconds: float = 300) -> dict:
    """The outcomes of a file of tests. The limit ends a hang only, on a busy machine as well."""
    for file in (tmp_path / "tests").glob("*.py"):
        file.unlink()
    (tmp_path / "test_gpu.py").write_text("import os, pathlib, signal, time, pytest\n" + source)

    def start(arguments):
        return script.start([sys.executable, *arguments], log=tmp_path / "log.txt")

    return script.gpu_tests.run(tmp_path / "parts", [], processes, seconds, start, script.stop)


@pytest.mark.drawn(8, of="long tests")
def test_processes_share_the_tests(script, tmp_path):
    """The first tests of two processes wait for each other, and every test runs once."""
    found = run_tests(
        script,
        tmp_path,
        """
@pytest.mark.parametrize("number", range(12))
def test_number(number):
    with open(f"ran-{os.getpid()}", "a") as file:
        file.write(f"{number}\\n")
    while len(list(pathlib.Path().glob("ran-*"))) < 2:
        time.sleep(0.05)
    assert number != 5
""",
        processes=2,
    )
    ran = [int(n) for file in tmp_path.glob("ran-*") for n in file.read_text().split()]
    assert sorted(ran) == list(range(12))
    assert found["passed"] == 11
    assert [name.rpartition("::")[2] for name in found["failed"]] == ["test_number[5]"]
    assert found["failure"] == "1 failed: test_gpu.py::test_number[5]"


@pytest.mark.drawn(8, of="long tests")
def test_a_process_that_dies_costs_one_test(script, tmp_path):
    found = run_tests(
        script,
        tmp_path,
        """
@pytest.mark.parametrize("number", range(5))
def test_number(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
""",
        processes=1,
    )
    assert found["passed"] == 4
    assert found["failed"] == {"test_gpu.py::test_number[2]": "its process ended while it ran"}


@pytest.mark.drawn(8, of="long tests")
def test_a_process_whose_gpu_is_broken_is_replaced(script, tmp_path):
    found = run_tests(
        script,
        tmp_path,
        """
import sys, types
class Cuda:
    broken = False
    def is_initialized(self): return True
    def synchronize(self):
        if self.broken: raise RuntimeError("CUDA error: an illegal memory access was encountered")
sys.modules["torch"] = types.SimpleNamespace(cuda=Cuda())
def test_first():
    sys.modules["torch"].cuda.broken = True
    assert False, "illegal memory access"
def test_second(): assert not sys.modules["torch"].cuda.broken
""",
        processes=1,
    )
    assert found["passed"] == 1
    ((name, why),) = found["failed"].items()
    assert name == "test_gpu.py::test_first" and "illegal memory access" in why


def test_what_was_found_before_the_end_of_the_time_counts(script, monkeypatch, tmp_path):
    """The time ends when the second test hangs, however long the first one took to be there."""

    class Clock:
        sleep = staticmethod(time.sleep)
        monotonic = staticmethod(lambda: 2.0 if (tmp_path / "hangs").exists() else 0.0)

    monkeypatch.setattr(script.gpu_tests, "time", Clock)
    found = run_tests(
        script,
        tmp_path,
        """
def test_first(): pass
def test_second():
    open("hangs", "w").close()
    time.sleep(3600)
def test_third(): pass
""",
        processes=1,
        seconds=1,
    )
    assert (found["passed"], found["failed"], found["not_run"]) == (1, {}, 1)
    assert found["unfinished"] == ["test_gpu.py::test_second"]
    assert found["failure"].startswith("ended after 1 s, its share of the time; 1 tests did not")


@pytest.mark.drawn(8, of="long tests")
def test_a_file_that_cannot_be_imported_is_a_failure(script, tmp_path):
    (tmp_path / "test_other.py").write_text("def test_other(): pass")
    found = run_tests(script, tmp_path, "import a_package_that_is_nowhere", processes=1)
    assert found["passed"] == 1
    ((name, why),) = found["failed"].items()
    assert name == "test_gpu.py" and "a_package_that_is_nowhere" in why


@pytest.mark.drawn(8, of="long tests")
def test_no_tests_are_a_failure(script, tmp_path):
    assert run_tests(script, tmp_path, "", processes=1)["failure"] == "no test passed (exit codes 5)"


@pytest.mark.drawn(8, of="long tests")
def test_the_core_comes_first(script, tmp_path):
    (tmp_path / "tests" / "ops").mkdir()
    for name in ("a", "attention"):
        file = tmp_path / "tests" / "ops" / f"test_{name}.py"
        file.write_text(f"def test_it():\n    open('order', 'a').write('{name} ')")
    run_tests(script, tmp_path, "", processes=1)
    assert (tmp_path / "order").read_text() == "attention a "


def test_tables(script):
    facts = {
        "device": "H100",
        "torch": "2.11",
        "benchmark of attention": {
            "measured": {
                "layers": [
                    {"shape": {"name": "cross"}, "forward": {"sdpa": 0.0015, "ours": "Error"}},
                    {"shape": {"name": "joint"}, "forward": {"ours": 0.25}},
                ]
            }
        },
        "benchmark of max_flow": {"measured": None, "failure": "exit code 1"},
    }
    assert "\n".join(script.gpu_tables.tables(facts)) == (
        "\n### attention, H100, torch 2.11, milliseconds\n\n"
        "| | sdpa | ours |\n"
        "| --- | ---: | ---: |\n"
        "| cross, forward | 1.5 | – |\n"
        "| joint, forward |  | 250 |"
    )


# --- the end of the time ---------------------------------------------------------------------------------------------


def test_what_a_benchmark_wrote_before_it_failed_counts(script, tmp_path):
    (tmp_path / "bench.py").write_text(BENCHMARK + "sys.exit(7)\n")
    found = script.measured(["bench.py"], 300, tmp_path / "found.json")
    assert found == {"failure": "exit code 7", "measured": {"device": "cuda", "ms": 1.5}}
    (tmp_path / "bench.py").write_text("raise SystemExit(7)")
    found = script.measured(["bench.py"], 300, tmp_path / "nothing.json")
    assert found == {"failure": "exit code 7", "measured": None}


@pytest.mark.drawn(8, of="long tests")
def test_a_step_that_hangs_is_ended_with_its_children(script, tmp_path):
    (tmp_path / "hang.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    start = time.monotonic()
    assert "ended after 3 s" in script.run(["hang.py"], 3)
    assert time.monotonic() - start < 30
    status = Path("/proc", (tmp_path / "child").read_text(), "status")
    deadline = time.monotonic() + 5
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "zombie" in status.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path / "results")])
    with pytest.raises(SystemExit, match="sees no GPU; this target needs one"):
        load_script().main()
    assert not (tmp_path / "results").exists()
