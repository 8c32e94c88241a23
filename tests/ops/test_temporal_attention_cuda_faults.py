"""The emulation of the CUDA kernels of temporal attention sees what is wrong with them.

Faults are put in: a barrier or a wait for copies is left out while the code runs, or a line of the code is changed.
"""

from __future__ import annotations

import pytest
import torch

from cvg_kernels.ops import _temporal_attention_native as native
from tests.ops.emulated_tiles import SHARED, Emulated, replace_cuda
from tests.ops.emulation import build, changed_sources
from tests.ops.temporal_cases import Case, check


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
    [("sm_80", 16, 40), ("sm_80", 16, 13), ("sm_80", 32, 24), ("sm_80", 64, 16), ("sm_89", 128, 160)],
)
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


TILES, BACKWARD = "include/cvg/tiles.h", "include/cvg/temporal_tiles_backward.h"
CHANGES = {
    "a-factor-turned": (BACKWARD, "load_matrix<W, Order::right, true>", "load_matrix<W, Order::down, true>"),
    "rows-of-another-lane": (BACKWARD, "(row + lane / 4 + 8 * (i % 2))", "(row + lane / 4 + 8 * (i / 2 % 2))"),
    "a-row-too-far": (TILES, "source += row + kRowsAtOnce < count ? step : 0", "source += step + 8"),
    "one-chunk-short": (TILES, "count = d < from.dim ? rows : 0", "count = d + 8 < from.dim ? rows : 0"),
    "registers-of-another-lane": (TILES, "left[lane] = a[lane].at[k]", "left[lane] = a[lane ^ 1].at[k]"),
    "beyond-the-tile": (TILES, "target = to + first * pitch + d", "target = to + first * pitch + d + 64"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.drawn(8, of="long tests")
def test_a_wrong_index_is_seen(emulation_folder, tmp_path, monkeypatch, change):
    """By the watch, or by the numbers."""
    csrc = changed_sources(tmp_path, *CHANGES[change])
    module = build(emulation_folder, "temporal_tiles_on_cpu", "temporal_tiles_emulated", "-DONLY_WARPS=2", csrc=csrc)
    replace_cuda(Emulated(module), monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)) as raised:
        check("cuda", Case("", 5, 2, 31, 48, 48), torch.float16)
    assert "not built" not in str(raised.value)
