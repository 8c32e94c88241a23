"""A plugin of pytest: of tests that take long together, a whole run takes some, drawn anew each time.

`@pytest.mark.drawn(4)` has a run of all tests take a quarter of a test's parameters, at least one, by the run's seed;
`@pytest.mark.drawn(3, of="trainings")` a third of all tests that name the same group.
`--all` takes all of them, and so does a run that names files or tests, or chooses by `-k` or `-m gpu`.
"""

from __future__ import annotations

import random
from collections import defaultdict

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="take every test and parameter that is drawn otherwise")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "drawn(n, of=None): a whole run takes one of n, drawn by its seed; --all all")
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        config.draws = worker["draws"]
        return
    chosen = config.option.keyword or config.option.markexpr == "gpu"
    everything = config.args_source is not pytest.Config.ArgsSource.ARGS and not chosen
    config.draws = everything and not (config.getoption("--all") or config.getoption("--write-coverage"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Tells the processes of pytest-xdist what was decided."""
    node.workerinput["draws"] = node.config.draws


def pytest_report_header(config: pytest.Config) -> str:
    return "tests: some, drawn by the seed (--all takes all)" if config.draws else "tests: all"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.draws:
        return
    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("drawn"):
            groups[mark.kwargs.get("of", item.nodeid.partition("[")[0])].append(item)
    left_out: set[pytest.Item] = set()
    for name, group in groups.items():
        count = -(-len(group) // group[0].get_closest_marker("drawn").args[0])
        taken = random.Random(f"{config.seed}:{name}").sample(group, count)
        left_out |= set(group) - set(taken)
    if left_out:
        config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))
        items[:] = [item for item in items if item not in left_out]
