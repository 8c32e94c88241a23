"""Backends as test parameters: each skipped, by name and reason, where it cannot run; marked `gpu` where it runs on one."""

from __future__ import annotations

import pytest
import torch

from cvg_kernels.backends import OPERATIONS, Backend, unavailable_reason

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(backend: str) -> torch.device:
    """Where a backend's tensors lie."""
    return torch.device("cpu") if backend == "native" else DEVICE


def needs(operation: str, backend: str):
    """A backend of an operation as a parameter."""
    device = device_of(backend)
    reason = unavailable_reason(operation, Backend(backend), device)
    marks = [pytest.mark.skipif(reason is not None, reason=str(reason))]
    return pytest.param(backend, marks=marks + [pytest.mark.gpu] * (device.type == "cuda"))


def backends(operation: str) -> list:
    """Every backend of an operation as a parameter."""
    return [needs(operation, backend.value) for backend in OPERATIONS[operation]]
