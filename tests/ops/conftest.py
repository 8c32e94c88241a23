"""The emulated kernels, built once for all tests."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.ops.emulation import build


@pytest.fixture(scope="session")
def emulation_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="session")
def tiles(emulation_folder) -> ModuleType:
    """The CUDA kernels of temporal attention."""
    return build(emulation_folder, "temporal_tiles_on_cpu", "temporal_tiles_emulated")


@pytest.fixture(scope="session")
def flow_team(emulation_folder) -> ModuleType:
    """The CUDA solver of maximum flow."""
    return build(emulation_folder, "max_flow_team_on_cpu", "max_flow_team_emulated")
