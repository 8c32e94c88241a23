"""Captured records as pages are made of them."""

from __future__ import annotations

import torch

from cvg_kernels.capturing.records import Record


class Captured:
    """What a page is made of: records of two words, two steps and two layers."""

    def __init__(self, frames: int = 3, cells: int = 6, steps: int = 2, branch: str = "cond") -> None:
        sizes = {"fine": (frames, cells, cells + 1), "coarse": (frames, cells // 2, cells // 2)}
        self.records = [
            Record(0, step, 900.0, layer, "cross", branch, ("cat", "</script>"), size, torch.rand(2, 2, *size))
            for step in range(steps)
            for layer, size in sizes.items()
        ]
