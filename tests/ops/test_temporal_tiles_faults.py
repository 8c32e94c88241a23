"""The emulation of the CUDA kernels of temporal attention sees what is wrong with them.

Faults are put in: a barrier or a wait for copies is left out while the code runs, or a line of the code is changed.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from cvg_kernels.ops import _temporal_attention_native as native
from tests.ops.emulation import ROOT, build
from tests.ops.test_temporal_attention import Case, check
from tests.ops.test_temporal_tiles import SHARED, Emulated, replace_cuda


def run_both(gpu: Emulated, name: str, frames: int, dim: int) -> None:
    """One pass, of three turns of every block and with every output."""
    positions = 5 * (4 if frames <= 16 else 2 if frames <= 32 else 1)
    query, key, value = torch.randn(3, 1, positions, 1, frames, dim).half()
    added = torch.randn(frames, frames)
    given = (query, key, value, added, 0.3, True)
    if name == "forward":
        native.forward(*given, True)
    else:
        grad_maps = torch.randn(1, positions, frames, frames)
        native.backward(torch.randn_like(query), grad_maps, *given, True, True, True, True, True)


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize(
    "gpu, frames, dim",
    [
        ("sm_80", 16, 40), ("sm_80", 16, 13), ("sm_80", 32, 24), ("sm_80", 64, 16),
        ("sm_89", 128, 160),
    ],
)  # fmt: skip
def test_no_barrier_and_no_wait_can_be_left_out(tiles, monkeypatch, name, gpu, frames, dim):
    """One warp a sequence, several, and tensors that take turns in the same memory."""
    emulated = Emulated(tiles)
    emulated.shared_bytes = SHARED[gpu]
    replace_cuda(emulated, monkeypatch)
    run_both(emulated, name, frames, dim)
    barriers, waits = tiles.barriers_met(), tiles.waits_met()
    assert len(barriers) >= 2 and len(waits) >= 1
    unseen = []
    for kind, places in (("barrier", barriers), ("wait", waits if dim % 8 == 0 else [])):
        for place in places:
            emulated.skipped_barrier = place if kind == "barrier" else 0
            emulated.skipped_wait = place if kind == "wait" else 0
            try:
                run_both(emulated, name, frames, dim)
                unseen.append((kind, place))
            except RuntimeError as error:
                expected = "no barrier between" if kind == "barrier" else "not waited for"
                assert expected in str(error)
    assert not unseen
