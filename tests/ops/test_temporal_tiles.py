"""The tile algorithm of the CUDA kernels, run on the CPU lane by lane: index maps, barriers, both layouts of memory."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cvg_kernels.backends import Backend
from cvg_kernels.ops import _temporal_attention_cuda, temporal_attention
from tests.ops.test_temporal_attention import Case, check

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

Strided = ctypes.c_int64 * 6  # address and strides


class Call(ctypes.Structure):
    """`Call` of temporal_tiles_on_cpu.cpp."""

    _fields_ = [
        ("sizes", ctypes.c_int64 * 6), ("bf16", ctypes.c_int64),
        ("query", Strided), ("key", Strided), ("value", Strided),
        ("added", ctypes.c_void_p), ("scale", ctypes.c_double), ("by_row_max", ctypes.c_int64),
        ("blocks", ctypes.c_int64), ("shared_bytes", ctypes.c_int64), ("backwards", ctypes.c_int64),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    file = tmp_path_factory.mktemp("tiles") / "tiles.so"
    source = Path(__file__).with_name("temporal_tiles_on_cpu.cpp")
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-unknown-pragmas",
         f"-I{ROOT / 'csrc/include'}", str(source), "-o", str(file)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(file))


class Device:
    """A GPU to `_temporal_attention_cuda._launch`: few blocks, so that each takes several turns.

    `shared_bytes` is what a block has; `backwards` runs its last warp first.
    """

    def __init__(self, library: ctypes.CDLL, shared_bytes: int, backwards: bool) -> None:
        self.library = library
        self.run = (2, shared_bytes, backwards)

    def launch(self, name: str, device: torch.device, *given) -> None:
        sizes, bf16, query, key, value, added, scale, by_row_max, *rest = given
        tensors = [self._flat(one) for one in (query, key, value)]
        call = Call((ctypes.c_int64 * 6)(*sizes), bf16, *tensors, added, scale, by_row_max, *self.run)
        getattr(self, name)(call, *rest)

    @staticmethod
    def _flat(strided) -> Strided:
        address, strides = strided
        return Strided(address, *strides)

    def temporal_attention_forward(self, call, out, maps) -> None:
        self.library.temporal_forward(ctypes.byref(call), self._flat(out), ctypes.c_void_p(maps))

    def temporal_attention_backward(
        self, call, grad_out, grad_maps, row_max_grad, query, key, value, allocate
    ) -> None:
        tensors = [self._flat(one) for one in (grad_out, query, key, value)]
        shares = self.library.temporal_shares(ctypes.byref(call))
        self.library.temporal_backward(
            ctypes.byref(call), (Strided * 4)(*tensors), ctypes.c_void_p(grad_maps),
            ctypes.c_int64(row_max_grad), ctypes.c_void_p(allocate(shares) if allocate else 0),
        )  # fmt: skip


ROOMY, TIGHT = 163 * 1024, 1


@pytest.fixture
def on_tiles(library, monkeypatch):
    """Makes `backend="cuda"` the emulation, on a device of one's choice."""

    def choose(shared_bytes: int = ROOMY, backwards: bool = False) -> None:
        device = Device(library, shared_bytes, backwards)
        monkeypatch.setattr(_temporal_attention_cuda, "_launch", device.launch)
        monkeypatch.setattr(
            "cvg_kernels.ops.temporal_attention.temporal_attention_module",
            lambda *call: (Backend.CUDA, _temporal_attention_cuda),
        )

    return choose
