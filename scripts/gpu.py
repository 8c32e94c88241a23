#!/usr/bin/env python3
"""Builds in place, tests, checks, tunes and measures on a machine with a GPU: `make gpu`.

Needs python3 with torch, and nvcc, and no network. What needs a package or a tool that is absent is skipped, by name.
Everything ends within the time of `--minutes`; what was found until then is in
benchmarks/results/<device>-<date>.json, written again after every step, and what a running step has found in the
folder .parts beside it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
sys.path[:0] = [str(SCRIPTS), str(ROOT)]  # nothing need be installed

import gpu_tables  # noqa: E402
import gpu_tests  # noqa: E402

from cvg_kernels import bench  # noqa: E402

BUILD_PACKAGES = ("setuptools", "cmake", "ninja", "pybind11")
#: The share of the remaining time that a step may take. The benchmarks take what is left, by their weights.
SHARES = {"build": 0.3, "tests": 0.4, "sanitizer": 0.2, "tune": 0.2}
#: What compute-sanitizer runs: every kernel once, forward and backward, on small layers of odd sizes.
SANITIZED = ["tests/ops/test_gpu.py", "-k", "every_kernel"]
SANITIZERS = ("memcheck", "racecheck", "synccheck")
#: Operation → the program that measures it, which takes `--device` and `--json`.
BENCHMARKS = {operation: ["-m", "cvg_kernels", "bench", operation] for operation in bench.BENCHMARKS}
#: How the benchmarks divide their time; 1 for those that are not here.
WEIGHTS = {"attention": 5, "frame_band_attention": 2, "temporal_attention": 2}
#: What a benchmark needs beyond torch.
NEEDS = {"guidance": ("diffusers", "transformers")}


class Report:
    """The result file, written again after every step."""

    def __init__(self, path: Path, facts: dict) -> None:
        self.path = path
        self.facts = facts
        self.failures: list[str] = []
        self.parts = path.with_suffix(".parts")
        shutil.rmtree(self.parts, ignore_errors=True)
        self.parts.mkdir(parents=True)
        self.write()

    def add(self, step: str, result: dict) -> None:
        self.facts[step] = result
        if result.get("failure"):
            self.failures.append(f"{step}: {result['failure']}")
        for name, reason in result.get("skipped", {}).items():
            print(f"skipped {name}: {reason}", flush=True)
        self.write()

    def write(self) -> None:
        written = self.path.with_suffix(".new")
        written.write_text(json.dumps(self.facts, indent=2) + "\n")
        written.replace(self.path)


def start(command: list[str], *, log: Path | None = None, **environment: str) -> subprocess.Popen:
    """Starts a program in a group of processes of its own, its output here or in a file."""
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(SCRIPTS))), "PYTHONUNBUFFERED": "1"}
    with nullcontext() if log is None else log.open("a") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | paths | environment, start_new_session=True, stdout=file, stderr=file
        )


def stop(process: subprocess.Popen) -> None:
    """Ends a program and everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(arguments: list[str], seconds: float, **environment: str) -> str | None:
    """Runs this Python with arguments, all of it ended after `seconds`; why it failed, or `None`."""
    print(f"+ python {' '.join(arguments)}   (at most {seconds:.0f} s)", flush=True)
    process = start([sys.executable, *arguments], **environment)
    try:
        code = process.wait(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} s, its share of the time"
    finally:
        if process.poll() is None:
            stop(process)
    return None if code == 0 else f"exit code {code}"


def absent(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def build(seconds: float) -> dict:
    """Builds the native modules in place, for the GPU of this machine only."""
    missing = absent(BUILD_PACKAGES)
    if missing:
        return {"skipped": {"native modules": f"{', '.join(missing)} not installed"}}
    began = time.monotonic()
    options = {"CVG_BUILD": "cuda", "CVG_CUDA_ARCHITECTURES": "native"}
    failure = run(["setup.py", "-q", "build_ext", "--inplace"], seconds, **options)
    return {"seconds": round(time.monotonic() - began, 1), "failure": failure}


def files_with_gpu_tests() -> list[str]:
    """Those that name the mark, or the parameters that carry it: to collect all others takes long, and finds none."""
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    named = re.compile(r"mark\.gpu\b|tests\.ops\.backends\b")
    return [str(file.relative_to(ROOT)) for file in files if named.search(file.read_text())]


def tests(seconds: float, parts: Path) -> dict:
    """Runs the tests marked `gpu`, in several processes."""
    if absent(("pytest",)):
        return {"skipped": {"tests": "pytest not installed"}}
    began = time.monotonic()
    processes = max(1, min(8, (os.cpu_count() or 1) // 2))
    print(f"+ pytest -m gpu, {processes} processes   (at most {seconds:.0f} s)", flush=True)
    result = gpu_tests.run(
        parts / "tests",
        ["-m", "gpu", *files_with_gpu_tests()],
        processes,
        seconds,
        lambda arguments: start([sys.executable, *arguments], log=parts / "pytest.txt", OMP_NUM_THREADS="2"),
        stop,
    )
    numbers = (f"{len(result[name])} {name}" for name in ("failed", "skipped", "unfinished"))
    print(f"{result['passed']} passed, {', '.join(numbers)}", flush=True)
    for name, why in result["failed"].items():
        print(f"FAILED {name}\n{why}\n", flush=True)
    return result | {"seconds": round(time.monotonic() - began, 1)}


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the PATH or beside nvcc."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    folders = [os.environ.get("PATH", ""), nvcc and str(Path(nvcc).resolve().parent)]
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders += [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(filter(None, folders)))


def sanitizer(seconds: float, parts: Path) -> dict:
    """Runs every kernel under each tool of compute-sanitizer, all tools at once."""
    program = find_sanitizer()
    if program is None or absent(("pytest",)):
        missing = "compute-sanitizer not found" if program is None else "pytest not installed"
        return {"skipped": {"compute-sanitizer": missing}}
    print(f"+ compute-sanitizer, {', '.join(SANITIZERS)}   (at most {seconds:.0f} s)", flush=True)
    end = time.monotonic() + seconds
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    running = {
        tool: start(
            [program, "--tool", tool, "--error-exitcode", "9", *pytest, *SANITIZED],
            log=parts / f"{tool}.txt",
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # else it sees one large block, and no end of a tensor
            OMP_NUM_THREADS="2",
        )
        for tool in SANITIZERS
    }
    said, bad = {}, []
    for tool, process in running.items():
        try:
            code = process.wait(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            code = f"ended after {seconds:.0f} s, its share of the time"
        finally:
            if process.poll() is None:
                stop(process)
        said[tool] = {"exit": code, "output": (parts / f"{tool}.txt").read_text(errors="replace")[-3000:]}
        if code != 0:
            bad.append(f"{tool}: {code if isinstance(code, str) else f'exit code {code}'}")
            print(f"{tool}\n{said[tool]['output']}", flush=True)
    return {"tools": said, "failure": "; ".join(bad) or None}


def measured(command: list[str], seconds: float, file: Path) -> dict:
    """Runs one program that writes JSON as it goes; what it wrote is the result."""
    failure = run([*command, "--device", "cuda", "--json", str(file)], seconds)
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # nothing yet, or killed while it wrote
        found = None
    return {"failure": failure, "measured": found}


def tune(seconds: float, parts: Path) -> dict:
    """Measures which backend is the fastest here. The table that `auto` reads stays as it is."""
    if not (ROOT / "cvg_kernels" / "cli" / "tune.py").exists():
        return {"skipped": {"tune": "this version has no `cvg-kernels tune`"}}
    return measured(["-m", "cvg_kernels", "tune", "--dry-run"], seconds, parts / "tune.json")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device() -> tuple[str, str]:
    """The name of the GPU and the version of torch; ends the program where one is missing."""
    if absent(("torch",)):
        sys.exit(f"make gpu: {sys.executable} has no torch; name another with PYTHON=…")
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"make gpu: torch {torch.__version__} sees no GPU; this target needs one (see `make test`)")
    return torch.cuda.get_device_name(), torch.__version__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop (8.5)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes

    def left() -> float:
        return end - time.monotonic()

    name, torch_version = device()
    date = datetime.date.today().isoformat()
    report = Report(
        options.results.resolve() / f"{slug(name)}-{date}.json", {"device": name, "date": date, "torch": torch_version}
    )
    report.add("build", build(SHARES["build"] * left()))
    run(["-m", "cvg_kernels", "info"], min(60, left()))
    report.add("tests", tests(SHARES["tests"] * left(), report.parts))
    report.add("sanitizer", sanitizer(SHARES["sanitizer"] * left(), report.parts))
    report.add("tune", tune(SHARES["tune"] * left(), report.parts))
    weights = {operation: WEIGHTS.get(operation, 1) for operation in BENCHMARKS}
    for operation, command in BENCHMARKS.items():
        share = left() * weights[operation] / sum(weights.values())
        del weights[operation]
        step = f"benchmark of {operation}"
        if missing := absent(NEEDS.get(operation, ())):
            reason = f"{', '.join(missing)} not installed"
            report.add(step, {"skipped": {step: reason}})
        else:
            report.add(step, measured(command, share, report.parts / f"{operation}.json"))
    shutil.rmtree(report.parts)  # all of it is in the result

    print("\n".join(gpu_tables.tables(report.facts)))
    for failure in report.failures:
        print(f"FAILED {failure}")
    print(f"wrote {report.path} in {(60 * options.minutes - left()):.0f} s")
    if report.facts["tune"].get("measured"):
        print(f"`cvg-kernels tune --from-results {report.path}` makes `auto` choose by it")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
