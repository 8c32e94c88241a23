"""The emulated kernels, built once for all tests."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

from tests.ops.emulation import built_once


@pytest.fixture(scope="session")
def emulation_folder(tmp_path_factory) -> Path:
    """Of this process alone."""
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="session")
def emulations(tmp_path_factory) -> Path:
    """Of all processes of the run."""
    folder: Path = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulations"


@pytest.fixture(scope="session")
def tiles(emulations) -> ModuleType:
    """The CUDA kernels of temporal attention."""
    return built_once(emulations, "temporal_tiles_on_cpu", "temporal_tiles_emulated")


@pytest.fixture(scope="session")
def flow_team(emulations) -> ModuleType:
    """The CUDA solver of maximum flow."""
    return built_once(emulations, "max_flow_team_on_cpu", "max_flow_team_emulated")
