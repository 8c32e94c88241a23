#!/usr/bin/env python3
"""Runs what must be right under every release of diffusers, each in a folder of packages of its own: `make matrix`.

The folders hold diffusers and what goes with it; torch and the package itself are those of the interpreter. The tests
are ordinary ones of tests/. What they found is written to docs/releases.json and docs/releases.md, never by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = ("diffusers", "transformers", "huggingface_hub")
#: The releases, with those of the other packages that were new then; first the lower bounds of pyproject.toml.
RELEASES = (
    ("0.34.0", "4.53.3", "0.34.4"),
    ("0.35.0", "4.56.0", "0.34.4"),
    ("0.36.0", "4.57.6", "0.36.0"),
    ("0.37.1", "5.3.0", "1.5.0"),
    ("0.38.0", "5.8.1", "1.12.2"),
    ("0.39.0", "5.12.1", "1.23.0"),
    ("0.40.0", "5.16.1", "1.33.0"),
    ("0.41.0", "5.20.2", "1.33.0"),
    ("0.42.1", "5.24.0", "2.4.0"),
)
#: One of each way to attend to text and frames.
PIPELINES = ("animatediff", "modelscope", "wan", "cogvideox")
#: Feature → its tests on a pipeline.
FEATURES = {
    "capture": ["tests/pipeline/test_matrix_capture.py::test_the_maps_of_words[{}]"],
    "swap": ["tests/pipeline/test_matrix.py::test_the_drop_in_swap[{}]"],
    **{
        method: [f"tests/pipeline/test_matrix.py::test_a_method_on_a_pipeline[{{}}-{method}]"]
        for method in ("vico", "cvg", "vstar", "gen1")
    },
}
#: Feature → its tests on the pipeline that ships.
SHAPES = {
    "weights": ["tests/shapes/test_files.py"],
    "sampling": ["tests/shapes/test_shipped.py"],
    "generate": [
        "tests/test_generate.py::test_the_main_job",
        "tests/test_generate.py::test_weights_are_in_the_dtype_asked_for",
    ],
    "cvg": ["tests/test_generate.py::test_every_method_writes_its_results[cvg]"],
    "training": ["tests/shapes/test_train.py::test_training_ends_in_a_stock_pipeline"],
}


@dataclass(frozen=True)
class Check:
    """The tests of one cell of the table."""

    subject: str
    feature: str
    tests: tuple[str, ...]


def checks() -> list[Check]:
    """The cells of a row."""
    of_pipelines = [
        Check(pipeline, feature, tuple(test.format(pipeline) for test in tests))
        for pipeline in PIPELINES
        for feature, tests in FEATURES.items()
    ]
    return of_pipelines + [Check("shapes", name, tuple(tests)) for name, tests in SHAPES.items()]


def environment(release: tuple[str, ...], folder: Path, pip: list[str]) -> dict[str, str]:
    """The variables under which Python finds a release, which is installed if it is not yet."""
    found = dict(os.environ)
    if tuple(version(package) for package in PACKAGES) == release:
        return found
    packages = folder / release[0]
    if not packages.exists():
        new = folder / f"{release[0]}.new"
        shutil.rmtree(new, ignore_errors=True)
        wanted = [f"{name}=={number}" for name, number in zip(PACKAGES, release, strict=True)]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(new), *pip]
        # What pip says of the packages beside the folder does not hold: they are not used together.
        done = subprocess.run([*command, *wanted], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"pip cannot install {' '.join(wanted)}:\n{done.stderr}")
        new.rename(packages)
    found["PYTHONPATH"] = str(packages)
    return found


def run(release: tuple[str, ...], variables: dict[str, str]) -> dict[str, dict[str, str]]:
    """Runs the tests under a release and returns subject → feature → "right", or what it is instead."""
    ask = f"from importlib.metadata import version; print(*map(version, {PACKAGES}))"
    told = subprocess.run([sys.executable, "-c", ask], env=variables, check=True, capture_output=True, text=True)
    if tuple(told.stdout.split()) != release:
        sys.exit(f"the packages must be those of {release}, got {told.stdout.strip()}")
    wanted = checks()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-q", f"--junitxml={report}"]
        tests = [test for check in wanted for test in check.tests]
        code = subprocess.run([*command, *tests], cwd=ROOT, env=variables).returncode
        if code > 1 or not report.exists():
            sys.exit(f"pytest ended with {code} under diffusers {release[0]}")
        outcomes = read(report)
    cells: dict[str, dict[str, str]] = {}
    for check in wanted:
        found = {
            outcome
            for test in check.tests
            for name, outcome in outcomes.items()
            if name == test or name.startswith((f"{test}::", f"{test}["))
        }
        cells.setdefault(check.subject, {})[check.feature] = worst(found)
    return cells


def read(report: Path) -> dict[str, str]:
    """Outcomes of the tests in pytest's report, by their names for the command line."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        told = {part.tag for part in case}
        if told & {"failure", "error"}:
            outcomes[name] = "wrong"
        else:
            outcomes[name] = "skipped" if "skipped" in told else "right"
    return outcomes


def worst(found: set[str]) -> str:
    """The outcome of several tests; "not run" if there is none."""
    return next((word for word in ("wrong", "skipped", "right") if word in found), "not run")


def page(rows: dict[str, dict]) -> str:
    """The table for readers."""
    subjects = [*PIPELINES, "shapes"]
    methods = ", ".join(name for name in FEATURES if name not in ("capture", "swap"))
    lines = [
        "# Releases of diffusers",
        "",
        "Written by `make matrix` (scripts/matrix.py), never by hand. A cell counts what the tests found right with "
        "these",
        "packages. On tiny pipelines: captured maps against softmax(q kᵀ) of the stock run, the drop-in swap,",
        f"and {methods}; where a method has nothing to guide, that it says so.",
        "With the shapes pipeline: its weights, sampling, `generate`, CVG and training.",
        "",
        f"| {' | '.join((*PACKAGES, 'torch', *subjects))} |",
        f"| {' | '.join(['---'] * (len(PACKAGES) + 1 + len(subjects)))} |",
    ]
    for row in rows.values():
        cells = [told(row["checks"][subject]) for subject in subjects]
        lines.append(f"| {' | '.join([*row['packages'].values(), row['torch'], *cells])} |")
    return "\n".join(lines) + "\n"


def told(outcomes: dict[str, str]) -> str:
    """A cell: how many are right, or which are not."""
    others = [f"{feature}: {how}" for feature, how in outcomes.items() if how != "right"]
    return ", ".join(others) or f"{len(outcomes)} right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = [release[0] for release in RELEASES]
    parser.add_argument("releases", nargs="*", help=f"some of {', '.join(numbers)}; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "matrix")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where to write")
    parser.add_argument("--pip", type=shlex.split, default=[], help="more arguments for pip")
    options = parser.parse_args()
    if unknown := set(options.releases) - set(numbers):
        parser.error(f"releases must be among {', '.join(numbers)}, got {', '.join(unknown)}")

    file = options.docs / "releases.json"
    before = json.loads(file.read_text())["releases"] if file.exists() else {}
    rows = {}
    for release in RELEASES:
        number = release[0]
        if options.releases and number not in options.releases:
            if number in before:
                rows[number] = before[number]
            continue
        print(f"diffusers {number}", flush=True)
        variables = environment(release, options.folder.resolve(), options.pip)
        rows[number] = {
            "packages": dict(zip(PACKAGES, release, strict=True)),
            "torch": version("torch").partition("+")[0],
            "checks": run(release, variables),
        }
    options.docs.mkdir(exist_ok=True)
    file.write_text(json.dumps({"releases": rows}, indent=2) + "\n")
    (options.docs / "releases.md").write_text(page(rows))
    wrong = [
        f"diffusers {number}, {subject}: {told(outcomes)}"
        for number, row in rows.items()
        for subject, outcomes in row["checks"].items()
        if set(outcomes.values()) != {"right"}
    ]
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
