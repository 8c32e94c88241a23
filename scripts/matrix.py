#!/usr/bin/env python3
"""Runs what must be right under every release of diffusers, and with older and newer Python and torch: `make matrix`.

A release of diffusers lies with what goes with it in a folder of packages; torch is that of the interpreter. An
environment is a virtual environment with its own Python and torch; it is made where that Python is found, and takes
gigabytes where no index of CPU wheels is given. The tests are ordinary ones of tests/. What they found is written to
docs/releases.json and docs/releases.md, never by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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


@dataclass(frozen=True)
class Environment:
    """Python and packages of a virtual environment; what is not pinned is the newest that the others allow."""

    python: str
    pins: tuple[str, ...] = ()


def lower_bounds() -> tuple[str, ...]:
    """What pyproject.toml asks for at least, each package pinned to just that."""
    text = (ROOT / "pyproject.toml").read_text()
    parts = [re.search(rf"^{name} = \[(.*?)^\]", text, re.S | re.M)[1] for name in ("dependencies", "video")]
    bounds = re.findall(r'^ *"([a-z-]+)>=([\d.]+)[";]', "".join(parts), re.M)
    return tuple(f"{package}=={number}" for package, number in bounds)


ENVIRONMENTS = {
    "lower bounds": Environment("3.10", lower_bounds()),
    "older torch": Environment("3.12", ("torch==2.8.0", "numpy==2.2.6")),
    "newest": Environment("3.13"),
}
#: Packages that a row of the environments names.
TOLD = ("torch", "triton", "numpy", "diffusers", "transformers", "accelerate")
#: Operations → their tests, for environments.
OPERATIONS = {
    "attention": ["tests/ops/test_attention_api.py", "tests/ops/test_frame_band_attention_api.py"],
    "flow": [
        "tests/ops/test_max_flow.py::test_definition",
        "tests/ops/test_path_flow.py::test_path_flow",
        "tests/ops/test_min_max_matmul.py::test_min_max_matmul",
    ],
    "temporal": [
        "tests/ops/test_temporal_attention.py::test_forward_and_gradients_float32",
        "tests/ops/test_temporal_maps_api.py",
    ],
    "mix": ["tests/ops/test_guidance_mix.py::test_against_float64", "tests/ops/test_guidance_mix.py::test_gradients"],
}
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


def checks(operations: bool = False) -> list[Check]:
    """The cells of a row, with or without those of the operations."""
    of_pipelines = [
        Check(pipeline, feature, tuple(test.format(pipeline) for test in tests))
        for pipeline in PIPELINES
        for feature, tests in FEATURES.items()
    ]
    own = [Check("operations", name, tuple(tests)) for name, tests in OPERATIONS.items()] if operations else []
    return own + of_pipelines + [Check("shapes", name, tuple(tests)) for name, tests in SHAPES.items()]


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


def virtual_environment(wanted: Environment, folder: Path, pip: list[str]) -> Path | None:
    """The Python of a virtual environment, which is made if it is not there yet; None without that Python."""
    interpreter = folder / "bin" / "python"
    if (folder / "whole").exists():
        return interpreter
    base = shutil.which(f"python{wanted.python}")
    if base is None:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    install = [str(interpreter), "-m", "pip", "install", "--quiet", "--no-compile", *pip]
    packages = (*wanted.pins, f"{ROOT}[video,test]")
    done = subprocess.run(
        [*install, *packages], env=os.environ | {"CVG_BUILD": "none"}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"pip cannot install {' '.join(packages)}:\n{done.stderr}")
    (folder / "whole").touch()
    return interpreter


def versions(interpreter: Path | str, packages: tuple[str, ...], variables: dict[str, str]) -> tuple[str, ...]:
    """The versions of packages that an interpreter finds."""
    ask = f"from importlib.metadata import version; print(*map(version, {packages}))"
    told = subprocess.run([str(interpreter), "-c", ask], env=variables, check=True, capture_output=True, text=True)
    return tuple(number.partition("+")[0] for number in told.stdout.split())


def run(
    name: str, wanted: list[Check], variables: dict[str, str], interpreter: Path | str = sys.executable
) -> dict[str, dict[str, str]]:
    """Runs the tests and returns subject → feature → "right", or what it is instead."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(interpreter), "-m", "pytest", "-p", "no:xdist", "-q", f"--junitxml={report}"]
        tests = [test for check in wanted for test in check.tests]
        code = subprocess.run([*command, *tests], cwd=ROOT, env=variables).returncode
        if code > 1 or not report.exists():
            sys.exit(f"pytest ended with {code} under {name}")
        outcomes = read(report)
    cells: dict[str, dict[str, str]] = {}
    for check in wanted:
        found = {
            outcome
            for test in check.tests
            for name, outcome in outcomes.items()
            if name == test or name.startswith((f"{test}::", f"{test}["))
        }
        if check.subject == "operations" and "right" in found:
            found.discard("skipped")  # backends that are not on this machine
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


def page(rows: dict[str, dict], environments: dict[str, dict]) -> str:
    """The tables for readers."""
    subjects = [*PIPELINES, "shapes"]
    methods = ", ".join(name for name in FEATURES if name not in ("capture", "swap"))
    lines = [
        "# Releases that were tested",
        "",
        "Written by `make matrix` (scripts/matrix.py), never by hand. A cell counts what the tests found right with",
        "these packages. On tiny pipelines: captured maps against softmax(q kᵀ) of the stock run, the drop-in swap,",
        f"and {methods}; where a method has nothing to guide, that it says so.",
        "With the shapes pipeline: its weights, sampling, `generate`, CVG and training.",
        "",
        "## diffusers",
        "",
        *table(
            [*PACKAGES, "torch", *subjects],
            [
                [*row["packages"].values(), row["torch"], *(told(row["checks"][subject]) for subject in subjects)]
                for row in rows.values()
            ],
        ),
        "",
        "## Python and torch",
        "",
        "Each in a virtual environment of its own; the first one has every lower bound of the package at once. The",
        "operations run as PyTorch and in Triton's interpreter; what is compiled knows nothing of torch.",
        "",
        *table(
            ["", "python", *TOLD, "operations", *subjects],
            [
                [name, row["python"], *row["packages"].values()]
                + [told(row["checks"][subject]) for subject in ("operations", *subjects)]
                for name, row in environments.items()
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def told(outcomes: dict[str, str]) -> str:
    """A cell: how many are right, or which are not."""
    others = [f"{feature}: {how}" for feature, how in outcomes.items() if how != "right"]
    return ", ".join(others) or f"{len(outcomes)} right"


def of_releases(options: argparse.Namespace, before: dict[str, dict]) -> dict[str, dict]:
    """The rows of the releases: of those that are asked for anew, of the others as before."""
    rows = {}
    for release in RELEASES:
        number = release[0]
        if options.rows and number not in options.rows:
            if number in before:
                rows[number] = before[number]
            continue
        print(f"diffusers {number}", flush=True)
        variables = environment(release, options.folder, options.pip)
        found = versions(sys.executable, PACKAGES, variables)
        if found != release:
            sys.exit(f"the packages must be those of {release}, got {' '.join(found)}")
        rows[number] = {
            "packages": dict(zip(PACKAGES, release, strict=True)),
            "torch": version("torch").partition("+")[0],
            "checks": run(f"diffusers {number}", checks(), variables),
        }
    return rows


def of_environments(options: argparse.Namespace, before: dict[str, dict]) -> dict[str, dict]:
    """The same of the environments."""
    rows = {}
    for name, wanted in ENVIRONMENTS.items():
        if options.rows and name not in options.rows:
            if name in before:
                rows[name] = before[name]
            continue
        print(name, flush=True)
        interpreter = virtual_environment(wanted, options.folder / name.replace(" ", "-"), options.pip)
        if interpreter is None:
            print(f"python{wanted.python} was not found: {name} stays as it was")
            if name in before:
                rows[name] = before[name]
            continue
        variables = os.environ | {"PYTHONPATH": str(ROOT)}
        rows[name] = {
            "python": wanted.python,
            "packages": dict(zip(TOLD, versions(interpreter, TOLD, variables), strict=True)),
            "checks": run(name, checks(operations=True), variables, interpreter),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*(release[0] for release in RELEASES), *ENVIRONMENTS]
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(map(repr, names))}; default: all")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv" / "matrix")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where to write")
    parser.add_argument("--pip", type=shlex.split, default=[], help="more arguments for pip")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if unknown := set(options.rows) - set(names):
        parser.error(f"rows must be among {', '.join(map(repr, names))}, got {', '.join(unknown)}")

    file = options.docs / "releases.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    found = {
        "releases": of_releases(options, before.get("releases", {})),
        "environments": of_environments(options, before.get("environments", {})),
    }
    options.docs.mkdir(exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n")
    (options.docs / "releases.md").write_text(page(*found.values()))
    wrong = [
        f"{name}, {subject}: {told(outcomes)}"
        for rows in found.values()
        for name, row in rows.items()
        for subject, outcomes in row["checks"].items()
        if set(outcomes.values()) != {"right"}
    ]
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
