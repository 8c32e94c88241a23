"""The CUDA kernels of temporal attention on the CPU, in the place of a GPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from cvg_kernels.ops import _choice
from cvg_kernels.ops import _temporal_attention_native as native

SHARED = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}  # bytes a block can have


class Emulated:
    """A GPU to `_temporal_attention_native`, of two blocks, so that each takes several turns.

    Every launch draws another order of warps and lanes.
    """

    blocks = 2

    def __init__(self, tiles: ModuleType) -> None:
        self.tiles = tiles
        self.shared_bytes = SHARED["sm_80"]
        self.skipped_barrier = self.skipped_wait = 0

    def partial_sums(self, query: torch.Tensor) -> int:
        return self.tiles.partial_sums(query.shape[3], self.blocks)

    def run(self, name: str, device: torch.device, *given) -> None:
        seed = int(torch.randint(2**31, ()))
        where = (self.blocks, self.shared_bytes, seed, self.skipped_barrier, self.skipped_wait)
        getattr(self.tiles, name)(*given, where)


def replace_cuda(gpu: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `backend="cuda"` the emulation."""
    monkeypatch.setattr(_choice, "unavailable_reason", lambda *call: None)
    monkeypatch.setattr(_choice, "_refusal", lambda *call: None)  # fewer frames than pay are right too
    monkeypatch.setattr(native, "_run", gpu.run)
    monkeypatch.setattr(native, "_partial_sums", gpu.partial_sums)
