"""scripts/gpu.py: what it writes down, what it skips by name, and that it ends in time. No GPU is used."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu.py"

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


def load_script():
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script on a project of its own, on a machine that seems to have a GPU."""
    module = load_script()
    (tmp_path / "setup.py").write_text("open('built', 'w').close()")
    (tmp_path / "test_gpu.py").write_text(TESTS)
    (tmp_path / "bench.py").write_text(BENCHMARK)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "BENCHMARKS", {"attention": ["bench.py"]})
    monkeypatch.setattr(module, "device", lambda: ("NVIDIA H100 80GB HBM3", "2.11.0"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path / "results")])
    return module


def result(tmp_path) -> dict:
    (file,) = (tmp_path / "results").glob("nvidia-h100-80gb-hbm3-*.json")
    return json.loads(file.read_text())


def test_builds_tests_measures_and_writes_it_down(script, tmp_path, capfd):
    script.main()
    facts = result(tmp_path)
    assert (tmp_path / "built").exists()
    assert facts["build"]["failure"] is None
    assert (facts["tests"]["passed"], facts["tests"]["failed"]) == (1, [])
    assert facts["tests"]["failure"] is None
    ((skipped, reason),) = facts["tests"]["skipped"].items()
    assert skipped.endswith("test_absent") and "a_package_that_is_nowhere" in reason
    assert facts["benchmark of attention"]["measured"] == {"device": "cuda", "ms": 1.5}
    assert f"skipped {skipped}" in capfd.readouterr().out


def test_an_absent_build_package_is_skipped_by_name(script, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(script, "BUILD_PACKAGES", ("setuptools", "a_package_that_is_nowhere"))
    script.main()
    said = "skipped native modules: a_package_that_is_nowhere not installed"
    assert said in capfd.readouterr().out
    assert not (tmp_path / "built").exists()


def test_a_benchmark_without_its_packages_is_skipped_by_name(script, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(script, "NEEDS", {"attention": ("torch", "a_package_that_is_nowhere")})
    assert script.main() == 0
    said = "skipped benchmark of attention: a_package_that_is_nowhere not installed"
    assert said in capfd.readouterr().out
    assert "measured" not in result(tmp_path)["benchmark of attention"]


def test_failures_are_named_and_the_rest_goes_on(script, tmp_path, capfd):
    (tmp_path / "setup.py").write_text("raise SystemExit(3)")
    (tmp_path / "test_gpu.py").write_text(
        TESTS.replace("test_right(): pass", "test_wrong(): 1 / 0")
    )
    assert script.main() == 1
    facts = result(tmp_path)
    assert facts["build"]["failure"] == "exit code 3"
    assert [name.rpartition("::")[2] for name in facts["tests"]["failed"]] == ["test_wrong"]
    assert facts["benchmark of attention"]["failure"] is None
    assert "FAILED build: exit code 3" in capfd.readouterr().out


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
