"""What every test runs under: fresh, printed seeds, poisoned memory, Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib.util
import os
import random
import secrets
import zlib

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

from tests.interpreter import round_as_gpus_do
from tests.memory import ALLOCATORS, poisoned, watched

# Triton reads this when a kernel is defined, so it has to stand before the first `import triton`.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# `auto` is the shipped table, whatever this machine's user has tuned.
os.environ["CVG_AUTO_DIR"] = os.path.join(os.path.dirname(__file__), "no-such-folder")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

pytest_plugins = ("tests.coverage.plugin", "tests.drawn", "tests.fresh")

# `with torch.device(…)` knows torch's constructors by identity from its first use on: that must not be a poisoned one.
_device_constructors()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat a run with the seed it printed")
    parser.addoption(
        "--faults", type=int, default=2, help="calls that fail in each case of tests/pipeline/test_faults.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--seed")
    worker = getattr(config, "workerinput", None)  # of a process of pytest-xdist
    if worker is not None:
        config.seed = worker["seed"]
        torch.set_num_threads(max(1, torch.get_num_threads() // worker["workercount"]))
    else:
        config.seed = secrets.randbelow(2**31) if given is None else given


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Gives every process the seed of the run."""
    node.workerinput["seed"] = node.config.seed


def pytest_report_header(config: pytest.Config) -> list[str]:
    from cvg_kernels import native

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    modules = "; ".join(f"{name}: {native.reason(name) or 'yes'}" for name in ("cpu", "cuda"))
    return [
        f"random seed {config.seed} (repeat with --seed {config.seed})",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, GPU: {gpu}, "
        f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')}",
        f"native modules: {modules}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture(autouse=True, scope="session")
def _rounding_of_the_interpreter() -> None:
    """Where Triton's kernels are interpreted, they round as on a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        round_as_gpus_do()


@pytest.fixture(autouse=True)
def _fresh_random_numbers(request: pytest.FixtureRequest) -> None:
    """Seeds every generator from the run's seed and the test's name: the same alone and in company."""
    seed = zlib.crc32(f"{request.config.seed}:{request.node.nodeid}".encode())
    print(f"seed {seed} (repeat with --seed {request.config.seed})")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel should have written and did not is NaN, not a lucky zero."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name), poisoned))


@pytest.fixture(autouse=True)
def _fresh_choices() -> None:
    """Tests change what can run here: nothing that was decided before holds in the next one."""
    from cvg_kernels.ops._choice import forget_choices

    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def one_thread() -> None:
    """For tests of tiny networks: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
