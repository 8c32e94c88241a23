"""scripts/matrix.py: its releases are the project's bounds, its tests exist, and its table says what ran."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("matrix_script", ROOT / "scripts" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up
        patch.setitem(sys.modules, "matrix_script", module)
        spec.loader.exec_module(module)
        yield module


def test_the_first_release_is_the_lower_bound(matrix):
    text = (ROOT / "pyproject.toml").read_text()
    for package, number in list(zip(matrix.PACKAGES, matrix.RELEASES[0], strict=True))[:2]:
        (bound,) = re.findall(rf'"{package}>=([\d.]+)"', text)
        assert number in (bound, f"{bound}.0")
    numbers = [tuple(map(int, release[0].split("."))) for release in matrix.RELEASES]
    assert numbers == sorted(numbers)


def test_its_tests_exist(matrix):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from tests.pipeline.matrix import KNOWN, METHODS

    assert set(matrix.PIPELINES) <= set(KNOWN)
    for check in matrix.checks(operations=True):
        for test in check.tests:
            file, _, name = test.partition("::")
            source = (ROOT / file).read_text()
            assert f"\ndef {name.partition('[')[0]}(" in source if name else source, test
    assert set(matrix.FEATURES) - {"capture", "swap"} <= set(METHODS)


def test_the_lower_bounds_are_pinned_at_once(matrix):
    pins = matrix.lower_bounds()
    text = (ROOT / "pyproject.toml").read_text()
    for name in ("dependencies", "video"):
        (part,) = re.findall(rf"^{name} = \[(.*?)^\]", text, re.S | re.M)
        for package, number in re.findall(r'"([\w-]+)>=([\d.]+)', part):
            assert f"{package}=={number}" in pins
    assert len(pins) == len({pin.partition("==")[0] for pin in pins}) > 10
    assert matrix.ENVIRONMENTS["lower bounds"].pins == pins
    (oldest,) = re.findall(r'requires-python = ">=([\d.]+)"', text)
    assert matrix.ENVIRONMENTS["lower bounds"].python == oldest


def test_the_tables_are_those_of_the_file(matrix):
    """Every release and every environment has been run, and was right."""
    rows = json.loads((ROOT / "docs" / "releases.json").read_text())
    assert (ROOT / "docs" / "releases.md").read_text() == matrix.page(rows["releases"], rows["environments"])
    for release in matrix.RELEASES:
        row = rows["releases"][release[0]]
        assert tuple(row["packages"].values()) == release
        assert row["checks"] == right(matrix.checks())
    assert list(rows["environments"]) == list(matrix.ENVIRONMENTS)
    for name, wanted in matrix.ENVIRONMENTS.items():
        row = rows["environments"][name]
        assert row["python"] == wanted.python
        pins = dict(pin.split("==") for pin in wanted.pins)
        assert all(row["packages"][told].startswith(pins.get(told, "")) for told in matrix.TOLD)
        assert row["checks"] == right(matrix.checks(operations=True))


def right(checks) -> dict[str, dict[str, str]]:
    """What the tables hold where everything was right."""
    wanted: dict[str, dict[str, str]] = {}
    for check in checks:
        wanted.setdefault(check.subject, {})[check.feature] = "right"
    return wanted


def test_outcomes(matrix, tmp_path):
    report = tmp_path / "report.xml"
    case = '<testcase classname="tests.shapes.test_files" name="{}">{}</testcase>'
    cases = [
        case.format("test_one[a-b]", ""),
        case.format("test_two", "<failure/>"),
        case.format("test_three", "<error/>"),
        case.format("test_four", "<skipped/><system-out>5</system-out>"),
    ]
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    outcomes = matrix.read(report)
    file = "tests/shapes/test_files.py"
    assert outcomes == {
        f"{file}::test_one[a-b]": "right",
        f"{file}::test_two": "wrong",
        f"{file}::test_three": "wrong",
        f"{file}::test_four": "skipped",
    }
    some = [outcomes[f"{file}::test_{name}"] for name in ("one[a-b]", "four")]
    assert matrix.worst(set(some)) == "skipped"
    assert matrix.worst({*some, "wrong"}) == "wrong"
    assert matrix.worst(set()) == "not run"
    assert matrix.told({"capture": "right", "swap": "right"}) == "2 right"
    assert matrix.told({"capture": "right", "swap": "skipped"}) == "swap: skipped"
