"""The models of this world that are in the sources: they fit, load as stock diffusers, and show what is asked for."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.scenes import pipeline  # noqa: E402
from cvg_kernels.scenes.captions import parse_caption  # noqa: E402
from cvg_kernels.scenes.evaluation import judge_prompts  # noqa: E402
from cvg_kernels.scenes.pipeline import SHIPPED, WEIGHTS, load_pipeline  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not WEIGHTS.exists(), reason="weights of this world are in the sources alone"),
]


def test_weights_fit():
    assert {path.name for path in WEIGHTS.iterdir()} == set(SHIPPED)
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert not [path for path in files if "/tmp" in path.read_bytes().decode("latin-1")]  # no place of a machine


@pytest.mark.drawn(4, of="shipped weights")
@pytest.mark.parametrize(
    "model, ends",
    [
        ("unet", {"right", "wrong count"}),
        ("transformer", {"right", "wrong count", "wrong shape"}),  # it has learnt colours; its outlines are loose
    ],
)
def test_it_shows_single_objects(model, ends):
    """Far above chance: a single object of a common pair is there in its colour."""
    asked = [parse_caption(text) for text in ("a red circle", "a green square", "a yellow cross", "a white square")]
    clips = judge_prompts(load_pipeline(model), 2 * asked, seed=3, steps=12)
    assert sum(clip.verdict.things[0] in ends for clip in clips) >= 5


def test_where_it_is_not_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "WEIGHTS", tmp_path / "none")
    with pytest.raises(ArgumentError, match="are in the sources alone; train one, or name a folder"):
        load_pipeline("transformer")
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ArgumentError, match="must hold one of AnimateDiffPipeline, CogVideoXPipeline, .* holds Wan"):
        load_pipeline(tmp_path)
