#!/usr/bin/env python3
"""Builds in place, tests and measures on a machine with a GPU: `make gpu`.

Needs python3 with torch, and nvcc, and no network. What needs a package that is absent is skipped, by name. Everything
ends within the time of `--minutes`; what was measured until then is in benchmarks/results/<device>-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD_PACKAGES = ("setuptools", "cmake", "ninja", "pybind11")
#: The share of the remaining time that a step may take. The benchmarks take what is left.
SHARES = {"build": 0.4, "tests": 0.5}
#: Operation → the program that measures it, which takes `--device` and `--json`: all of benchmarks/ but pytest's.
BENCHMARKS = {
    path.stem: ["-m", "cvg_kernels", "bench", path.stem]
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if path.stem != "kernels"
}
#: What a benchmark needs beyond torch.
NEEDS = {"guidance": ("diffusers", "transformers")}


class Report:
    """The result file, written again after every step."""

    def __init__(self, path: Path, facts: dict) -> None:
        self.path = path
        self.facts = facts
        self.failures: list[str] = []

    def add(self, step: str, result: dict) -> None:
        self.facts[step] = result
        if result.get("failure"):
            self.failures.append(f"{step}: {result['failure']}")
        for name, reason in result.get("skipped", {}).items():
            print(f"skipped {name}: {reason}", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.facts, indent=2) + "\n")


def run(arguments: list[str], seconds: float, **environment: str) -> str | None:
    """Runs this Python with arguments, all of it ended after `seconds`; why it failed, or `None`."""
    print(f"+ python {' '.join(arguments)}   (at most {seconds:.0f} s)", flush=True)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment,
        start_new_session=True,
    )
    try:
        code = process.wait(timeout=max(seconds, 1))
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"ended after {seconds:.0f} s, its share of the time"
        raise
    return None if code == 0 else f"exit code {code}"


def absent(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def build(seconds: float) -> dict:
    """Builds the native modules in place."""
    missing = absent(BUILD_PACKAGES)
    if missing:
        return {"skipped": {"native modules": f"{', '.join(missing)} not installed"}}
    start = time.monotonic()
    failure = run(["setup.py", "-q", "build_ext", "--inplace"], seconds, CVG_BUILD="cuda")
    return {"seconds": round(time.monotonic() - start, 1), "failure": failure}


def tests(seconds: float) -> dict:
    """Runs the tests marked `gpu`."""
    if absent(("pytest",)):
        return {"skipped": {"tests": "pytest not installed"}}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        failure = run(["-m", "pytest", "-m", "gpu", "-q", f"--junitxml={file}"], seconds)
        cases = list(ElementTree.parse(file).iter("testcase")) if file.exists() else []
    outcome = {"passed": 0, "failed": [], "skipped": {}}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            outcome["failed"].append(name)
        elif case.find("skipped") is not None:
            outcome["skipped"][name] = case.find("skipped").get("message", "")
        else:
            outcome["passed"] += 1
    if failure is None and not outcome["passed"]:
        failure = "no test ran"
    return outcome | {"seconds": round(time.monotonic() - start, 1), "failure": failure}


def benchmark(command: list[str], seconds: float) -> dict:
    """Runs one benchmark; its own JSON is the result."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        failure = run([*command, "--device", "cuda", "--json", str(file)], seconds)
        measured = json.loads(file.read_text()) if file.exists() else None
    return {"failure": failure, "measured": measured}


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device() -> tuple[str, str]:
    """The name of the GPU and the version of torch; ends the program where one is missing."""
    if absent(("torch",)):
        sys.exit(f"make gpu: {sys.executable} has no torch; name another with PYTHON=…")
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"make gpu: torch {torch.__version__} sees no GPU; this target needs one (see `make test`)"
        )
    return torch.cuda.get_device_name(), torch.__version__


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop (8.5)")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result"
    )
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes

    def left() -> float:
        return end - time.monotonic()

    name, torch_version = device()
    date = datetime.date.today().isoformat()
    report = Report(
        options.results.resolve() / f"{slug(name)}-{date}.json",
        {"device": name, "date": date, "torch": torch_version},
    )
    report.add("build", build(SHARES["build"] * left()))
    run(["-m", "cvg_kernels", "info"], 60)
    report.add("tests", tests(SHARES["tests"] * left()))
    for number, (operation, command) in enumerate(BENCHMARKS.items()):
        share = left() / (len(BENCHMARKS) - number)
        step = f"benchmark of {operation}"
        if missing := absent(NEEDS.get(operation, ())):
            reason = f"{', '.join(missing)} not installed"
            report.add(step, {"skipped": {step: reason}})
        else:
            report.add(step, benchmark(command, share))

    for failure in report.failures:
        print(f"FAILED {failure}")
    print(f"wrote {report.path} in {(60 * options.minutes - left()):.0f} s")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
