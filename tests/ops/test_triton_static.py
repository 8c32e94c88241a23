"""Every Triton kernel in use, compiled for GPUs that are not here: no spills on sm_90, tensor cores where they belong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from cvg_kernels.bench.static import TARGETS, VARIANTS  # noqa: E402
from cvg_kernels.bench.variants import AttentionVariant  # noqa: E402


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """All variants on all targets; in a process of its own, as interpreted kernels cannot be compiled."""
    path: Path = tmp_path_factory.mktemp("static") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-m", "cvg_kernels", "bench", "--static", "--json", str(path)],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return json.loads(path.read_text())


def test_every_variant_compiles_for_every_target(rows):
    compiled = {(row["variant"], row["dtype"], row["target"]) for row in rows}
    assert compiled == {(v.name, v.dtype, target) for v in VARIANTS for target in TARGETS}
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {
        "forward_kernel", "capture_kernel", "delta_kernel", "query_kernel", "key_kernel",
        "forward_kernel, maps only", "query_kernel, maps only", "key_kernel, maps only",
        "hop_kernel", "ties_kernel", "flow_gradient_kernel", "hop_gradient_kernel", "hop_kernel, soft",
        "flow_gradient_kernel, soft", "hop_gradient_kernel, soft",
        "turn_kernel", "shares_kernel", "peak_kernel", "hit_kernel", "share_gradient_kernel",
        "temporal_forward_kernel", "temporal_forward_kernel, maps", "temporal_backward_kernel",
        "temporal_backward_kernel, maps", "temporal_backward_kernel, maps, band",
        "frame_band_forward_kernel", "frame_band_row_kernel", "frame_band_key_kernel",
    }  # fmt: skip


def test_no_local_memory_on_sm_90(rows):
    spilling = [row for row in rows if row["target"] == "sm_90" and row["spills"]]
    assert not spilling, spilling


def test_wgmma_on_sm_90(rows):
    """The products of the attention kernels are Hopper's warp-group products for head_dim 64 and 128 in 16 bit."""
    names = {v.name for v in VARIANTS if isinstance(v, AttentionVariant) and v.dim in (64, 128)}
    checked = 0
    for row in rows:
        if row["target"] == "sm_90" and row["variant"] in names and row["dtype"] != "float32":
            assert row["wgmma"] > 0, row
            checked += 1
    assert checked >= 20


def test_matrix_cores_elsewhere(rows):
    for row in rows:
        if row["dtype"] != "float32" and row["target"] in ("sm_80", "gfx942"):
            assert row["mma"] > 0, row
