"""Notes that tests make for the table of coverage: compared with the committed one, or, with --write-coverage,
written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.coverage import table

_KEY = "coverage"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-coverage",
        action="store_true",
        help="write docs/coverage.json and docs/coverage.md from what the tests find, and compare nothing with them",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Notes(config), "coverage-notes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where the table is to be written, tests that note nothing are left out."""
    if config.getoption("--write-coverage"):
        kept = [item for item in items if "coverage_note" in getattr(item, "fixturenames", ())]
        dropped = [item for item in items if item not in kept]
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


class _Notes:
    """Collects the notes of all tests that passed, of other processes too, and writes them at the end."""

    def __init__(self, config: pytest.Config) -> None:
        # a process of pytest-xdist hands its notes to the one that started it
        self.writes = config.getoption("--write-coverage") and not hasattr(config, "workerinput")
        self.notes: list[tuple[str, str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.notes += [tuple(note) for key, note in report.user_properties if key == _KEY]

    def pytest_sessionfinish(self) -> None:
        if self.writes and self.notes:
            table.write(self.notes)


@pytest.fixture
def coverage_note(request: pytest.FixtureRequest) -> Callable[[str, str, Any], None]:
    """`coverage_note(row, column, value)`: says what the table holds for a case of `tests.pipelines`.

    A float is an error and must be within the committed bound; anything else must be what is committed. The table is
    of the newest diffusers: with older ones nothing is compared.
    """
    from tests.pipelines.case import older_than_the_builders

    writing = request.config.getoption("--write-coverage")
    compared = not writing and not older_than_the_builders()
    committed = table.read()["rows"]

    def note(row: str, column: str, value: Any) -> None:
        request.node.user_properties.append((_KEY, [row, column, value]))
        there = committed.get(row, {}).get(column)
        if compared:
            assert table.agrees(value, there), (
                f"docs/coverage.json has {column} = {there!r} for {row}, this run {value!r}; if that is as it should "
                "be, `make coverage` writes the table anew"
            )

    return note
