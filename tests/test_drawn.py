"""What a whole run takes of tests with very many parameters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFTEST = """
import pytest
pytest_plugins = ("tests.drawn",)
def pytest_addoption(parser):
    parser.addoption("--seed", type=int)
    parser.addoption("--write-coverage", action="store_true")
@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.seed = config.getoption("--seed")
"""
TESTS = """
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.drawn(4)
@pytest.mark.parametrize("number", range(10))
def test_many(number): ...
@pytest.mark.drawn(4)
@pytest.mark.parametrize("number", range(2))
def test_few(number): ...
@pytest.mark.drawn(2, of="a group")
def test_heavy(): ...
@pytest.mark.drawn(2, of="a group")
def test_heavier(): ...
def test_one(): ...
"""


@pytest.fixture
def collected(tmp_path):
    """Names of the tests that a run of the folder takes, by its arguments."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)

    def collect(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", *["-p", "no:cacheprovider", "--co", "-q"], *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return [line.partition("::")[2] for line in ended.stdout.splitlines() if "::" in line]

    return collect


@pytest.mark.drawn(4, of="long tests")
def test_a_whole_run_takes_a_share_and_another_seed_another(collected):
    drawn = [collected("--seed", str(seed)) for seed in (1, 1, 2, 3)]
    for names in drawn:
        assert "test_one" in names
        assert sum(name.startswith("test_many") for name in names) == 3
        assert sum(name.startswith("test_few") for name in names) == 1
        assert sum(name.startswith("test_heav") for name in names) == 1
    assert drawn[0] == drawn[1] and len({tuple(names) for names in drawn}) > 1


@pytest.mark.drawn(4)
@pytest.mark.parametrize(
    "asked", [["--all"], ["--write-coverage"], ["test_it.py"], ["-k", "test"], ["-m", "gpu"]], ids=str
)
def test_who_asks_for_all_has_all(collected, asked):
    assert len(collected("--seed", "1", *asked)) == 15
