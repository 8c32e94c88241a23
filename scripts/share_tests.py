"""A plugin of pytest: several processes share the tests, and each outcome is written down before the next test starts.

Every process collects all tests. It claims a test by making a file, which only one of them can, so none runs twice and
no process waits while there is work. An outcome is one line of JSON in a file of the process; nothing that happens to
the process later takes it away. A process whose GPU context is broken ends, for no later test of its could pass.

    pytest -p share_tests --share FOLDER [--share-first FILE[,FILE]]
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=Path, help="folder of the claims and the outcomes")
    parser.addoption("--share-first", default="", help="test files that come before the others")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--share"):
        config.pluginmanager.register(Share(config), "share")


class Share:
    """The claims and outcomes of this process."""

    def __init__(self, config: pytest.Config) -> None:
        self.folder = config.getoption("--share")
        self.first = [name for name in config.getoption("--share-first").split(",") if name]
        self.lines = (self.folder / f"outcomes-{os.getpid()}.jsonl").open("a", buffering=1)

    def write(self, **line) -> None:
        self.lines.write(json.dumps(line) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Puts the files that come first there; the order within a file stays."""

        def place(item: pytest.Item) -> int:
            file = item.nodeid.partition("::")[0]
            return self.first.index(file) if file in self.first else len(self.first)

        items.sort(key=place)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Runs what no other process has claimed."""
        self.write(collected=[item.nodeid for item in session.items])
        for item in session.items:
            name = hashlib.sha256(item.nodeid.encode()).hexdigest()
            try:
                (self.folder / f"claim-{name}").touch(exist_ok=False)
            except FileExistsError:
                continue
            self.write(started=item.nodeid)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if _gpu_is_broken():
                os._exit(1)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes down what decides: a failure or a skip of any phase, and that the call passed."""
        if report.when == "call" or not report.passed:
            self.write(test=report.nodeid, outcome=report.outcome, why=_why(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failure, one that is skipped whole is skipped."""
        if not report.passed:
            self.write(test=report.nodeid, outcome=report.outcome, why=_why(report))


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason of a skip; of a failure what it printed, the seed of its numbers for instance,
    and where it failed.
    """
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    printed = [f"{title}\n{text}" for title, text in report.sections]
    return "\n".join([*printed, report.longreprtext])[-3000:]


def _gpu_is_broken() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
