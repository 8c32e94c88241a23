"""Loads the compiled modules and remembers why one is absent."""

from __future__ import annotations

import importlib
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Literal

from cvg_kernels.errors import ArgumentError, BackendUnavailableError

Target = Literal["cpu", "cuda"]
#: The environment variable that sets the instruction-set level of the CPU module; read once, when the module is
#: loaded.
LEVEL_VARIABLE = "CVG_CPU_ISA"
_BUILD_INFO = Path(__file__).with_name("_build_info.json")


@lru_cache
def build_info() -> dict[str, str | None]:
    """What the build wrote down: per module `None` if it was built, else the reason why not."""
    if _BUILD_INFO.exists():
        return json.loads(_BUILD_INFO.read_text())
    return {}


@lru_cache
def _load(target: Target) -> ModuleType | str:
    """The module, or the reason why there is none; `ArgumentError` for a level that is none."""
    try:
        return importlib.import_module(f"cvg_kernels._native_{target}")
    except ImportError as error:
        if str(error).startswith(LEVEL_VARIABLE):  # a setting to correct, not a module to do without
            raise ArgumentError(str(error)) from None
        built = build_info().get(target, "this source tree was never built")
        reason = built if built is not None else f"it was built but does not load: {error}"
        remedy = {
            "cpu": "install a C++17 compiler and reinstall with CVG_BUILD=cpu",
            "cuda": "on a machine with an NVIDIA GPU: install nvcc and reinstall with CVG_BUILD=cuda",
        }
        return f"the compiled {target} module is absent: {reason} ({remedy[target]})"


def reason(target: Target) -> str | None:
    """Why the compiled module for `target` is absent; `None` if it is there.

    Raises:
        ArgumentError: if `CVG_CPU_ISA` names no level that this machine can run.
    """
    loaded = _load(target)
    return loaded if isinstance(loaded, str) else None


def load(target: Target) -> ModuleType:
    """The compiled module for `target`.

    Raises:
        BackendUnavailableError: with the reason, if it is absent.
        ArgumentError: as for `reason`.
    """
    loaded = _load(target)
    if isinstance(loaded, str):
        raise BackendUnavailableError(loaded)
    return loaded
