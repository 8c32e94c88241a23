"""Pictures: that they are made, of the size they should be, and show what they were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from cvg_kernels import viz  # noqa: E402


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def reddish(picture: np.ndarray) -> int:
    """Pixels in the colour of the cut."""
    return int((np.abs(picture - np.array([220, 20, 60])).sum(-1) < 60).sum())


def test_flow_graph_shows_the_cut_in_red(tmp_path):
    cross, hop = torch.rand(4), torch.rand(4, 4)
    near = torch.zeros(2, 4, dtype=torch.bool)
    viz.flow_graph(cross, [hop], near, tmp_path / "cut.png", token="cat", sink=1)
    everything = torch.ones(2, 4, dtype=torch.bool)
    viz.flow_graph(cross, [hop], everything, tmp_path / "none.png", token="cat", sink=1)
    assert reddish(pixels(tmp_path / "cut.png")) > 50 > reddish(pixels(tmp_path / "none.png"))


def test_curves_and_maps(tmp_path):
    entries = [{"rate": 0.2, "ci95": [0.1, 0.3]}, {"mean": 0.6, "ci95": [0.5, 0.7]}]
    viz.curve_with_intervals([1.0, 2.0], {"present": entries}, tmp_path / "curve.png", label="x", stock=1.0)
    viz.attention_maps({"a": torch.eye(5), "b": torch.rand(5, 5)}, tmp_path / "maps.png")
    for name in ("curve.png", "maps.png"):
        assert pixels(tmp_path / name).std() > 10
