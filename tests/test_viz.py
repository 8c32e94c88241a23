"""Pictures: that they are made, of the size they should be, and show what they were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from matplotlib.figure import Figure  # noqa: E402

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


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved, in their order."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (saved.append(figure), save(figure, *args, **kw))
    )
    return saved


def test_a_curve_goes_through_its_values_with_their_intervals(figures, tmp_path):
    entries = [{"rate": 0.2, "ci95": [0.1, 0.3]}, {"mean": 0.6, "ci95": [0.5, 0.7]}]
    viz.curve_with_intervals([1.0, 2.0], {"present": entries}, tmp_path / "curve.png", label="x", stock=1.0)
    (figure,) = figures
    (axes,) = figure.axes
    drawn = [np.asarray(line.get_xydata(), float).tolist() for line in axes.lines]
    assert [[1.0, 0.2], [2.0, 0.6]] in drawn
    (area,) = axes.collections
    corners = area.get_paths()[0].vertices
    for x, interval in ((1.0, [0.1, 0.3]), (2.0, [0.5, 0.7])):
        np.testing.assert_allclose(np.unique(corners[corners[:, 0] == x, 1]), interval)
    assert pixels(tmp_path / "curve.png").ndim == 3


def test_maps_are_drawn_as_they_are(figures, tmp_path):
    maps = {"a": torch.eye(5), "b": torch.rand(5, 5)}
    viz.attention_maps(maps, tmp_path / "maps.png")
    (figure,) = figures
    drawn = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    assert list(drawn) == list(maps)
    for name, values in maps.items():
        np.testing.assert_allclose(drawn[name], values, rtol=1e-6)
    assert pixels(tmp_path / "maps.png").ndim == 3
