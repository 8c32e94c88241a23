"""What every test runs under: the Triton interpreter without a GPU, printed seeds, poisoned scratch memory."""

from __future__ import annotations

import os
import random
import sys
import zlib

import numpy as np
import pytest
import torch

# Triton reads this when a kernel is defined, so it has to stand before the first `import triton`.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEED = int(os.environ.get("CVG_TEST_SEED", "0"))
_FUNCTIONS = ("empty", "empty_like", "empty_strided", "empty_permuted")
_METHODS = ("new_empty", "new_empty_strided")


def pytest_report_header() -> list[str]:
    from cvg_kernels import native

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    modules = ", ".join(f"{name}: {native.reason(name) or 'yes'}" for name in ("cpu", "cuda"))
    return [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, GPU: {gpu}, "
        f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')}, CVG_TEST_SEED={SEED}",
        f"native modules: {modules}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds every generator with a number of the test's own, printed with a failure.

    CVG_TEST_SEED=n (0 unless told) moves all of them; a test draws the same numbers alone and in company.
    """
    number = zlib.crc32(f"{SEED}:{request.node.nodeid}".encode())
    print(f"seed {number} (CVG_TEST_SEED={SEED})")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    return number


def _poisoned(allocate):
    """`torch.empty` and its like, filled with NaN (or the largest integer) when the package calls them."""

    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] in ("cvg_kernels", "python_ref"):
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(torch.nan)
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel should have written and did not is NaN, not a lucky zero."""
    for name in _FUNCTIONS:
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in _METHODS:
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
