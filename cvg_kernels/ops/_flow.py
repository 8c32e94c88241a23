"""What path flow and the min-max product share."""

from __future__ import annotations

from types import ModuleType

from cvg_kernels.backends import Backend
from cvg_kernels.errors import ArgumentError


def check_temperature(temperature: float | None) -> None:
    """Checks the temperature of a soft form.

    Raises:
        ArgumentError: unless it is `None` or positive.
    """
    if temperature is not None and not temperature > 0:
        raise ArgumentError(f"temperature must be None or positive, got {temperature!r}")


def flow_module(backend: str) -> ModuleType:
    """The module with the kernels of a backend: those of `path_flow` and of `min_max_matmul`."""
    if backend == Backend.NATIVE.value:
        from cvg_kernels.ops import _path_flow_native as module
    else:
        from cvg_kernels._triton import path_flow as module
    return module
