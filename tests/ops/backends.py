"""Backends as test parameters: each skipped, by name and reason, where it cannot run; marked `gpu` where it runs on
one.
"""

from __future__ import annotations

import pytest
import torch

from cvg_kernels.backends import OPERATIONS, Backend, unavailable_reason

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(backend: str) -> torch.device:
    """Where a backend's tensors lie."""
    return torch.device("cpu") if backend == "native" else DEVICE


def backends(operation: str, *names: str) -> list:
    """Backends of an operation as parameters: those named, or every one."""

    def parameter(backend: Backend):
        device = device_of(backend.value)
        reason = unavailable_reason(operation, backend, device)
        marks = [pytest.mark.skipif(reason is not None, reason=str(reason))]
        return pytest.param(backend.value, marks=marks + [pytest.mark.gpu] * (device.type == "cuda"))

    return [parameter(b) for b in (map(Backend, names) if names else OPERATIONS[operation])]
