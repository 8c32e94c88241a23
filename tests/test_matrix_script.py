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
    for check in matrix.checks():
        for test in check.tests:
            file, _, name = test.partition("::")
            source = (ROOT / file).read_text()
            assert f"\ndef {name.partition('[')[0]}(" in source if name else source, test
    assert set(matrix.FEATURES) - {"capture", "swap"} <= set(METHODS)


def test_the_table_is_that_of_the_file(matrix):
    """Every release has been run, and was right."""
    rows = json.loads((ROOT / "docs" / "releases.json").read_text())["releases"]
    assert (ROOT / "docs" / "releases.md").read_text() == matrix.page(rows)
    wanted = {}
    for check in matrix.checks():
        wanted.setdefault(check.subject, {})[check.feature] = "right"
    for release in matrix.RELEASES:
        row = rows[release[0]]
        assert tuple(row["packages"].values()) == release
        assert row["checks"] == wanted


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
