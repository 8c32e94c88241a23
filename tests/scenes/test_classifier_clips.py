"""What this world's classifiers are taught: labels of what the oracle sees, features that go on after a kill."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.composition import entities_of  # noqa: E402
from cvg_kernels.scenes.captions import parse_caption, random_clip  # noqa: E402
from cvg_kernels.scenes.classifier_clips import LABELS, Clips, label_clip, labels_asked  # noqa: E402
from cvg_kernels.scenes.oracle import look  # noqa: E402
from cvg_kernels.scenes.pipeline import WEIGHTS, load_pipeline  # noqa: E402
from cvg_kernels.scenes.world import RELATIONS, render  # noqa: E402
from cvg_kernels.training.features import make_features  # noqa: E402
from cvg_kernels.training.store import GENERATED, load  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def seen_in(shown: str):
    """What the oracle sees in a true clip."""
    return look(render([random_clip(np.random.default_rng(3), parse_caption(shown))])[0])


@pytest.mark.parametrize(
    ("shown", "prompt", "expected"),
    [
        ("two red circles and a blue square", "two red circles and a blue square", ["two", "one"]),
        ("three red circles", "a red circle and a blue square", ["three", "none"]),
        ("a red square", "a red circle and a blue square", ["none", "none"]),
    ],
)
def test_numbers_are_those_seen(shown, prompt, expected):
    assert label_clip("number", seen_in(shown), parse_caption(prompt)) == expected


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_those_seen(relation):
    seen, alone = seen_in(f"a red circle {relation} a blue square"), seen_in("a red circle")
    for asked in RELATIONS:
        prompt = parse_caption(f"a red circle {asked} a blue square")
        (label,) = label_clip("relation", seen, prompt)
        assert label in ((relation,) if relation != "behind" or asked == "behind" else (asked, "behind"))
        assert labels_asked("relation", prompt) == [asked]
        assert label_clip("relation", alone, prompt) == ["neither"]


@pytest.mark.parametrize(
    ("question", "prompt"),
    [("number", "two red circles and a blue square"), ("relation", "a red circle above a white cross")],
)
def test_what_is_asked_is_what_guidance_reads(question, prompt):
    """The labels of training are those that `CVG` takes from a prompt."""
    read = [entity.label for entity in entities_of(prompt, LABELS[question])]
    assert labels_asked(question, parse_caption(prompt)) == [label for label in read if label is not None]


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.skipif(not WEIGHTS.exists(), reason="weights of this world are in the sources alone")
@pytest.mark.parametrize("question", list(LABELS))
def test_features_are_made_and_kept(tmp_path, question):
    pipe = load_pipeline()
    clips = Clips(question, generated=12, read_steps=1, steps=2)
    make_features(tmp_path, pipe, clips)
    index, examples = load(tmp_path)
    assert index["labels"] == list(LABELS[question]) and len(examples) == 12
    assert (examples.source == GENERATED).all() and examples.clip.tolist() == list(range(12))
    assert ((examples.label >= 0).sum(1) == (examples.asked >= 0).sum(1)).all()
    if question == "number":  # two things in the first batch, three in the second
        assert (examples.label[:10] >= 0).sum(1).unique().tolist() == [2]
        assert (examples.label[10:] >= 0).sum(1).unique().tolist() == [3]
    last = tmp_path / "000010.safetensors"
    before = last.read_bytes()
    last.unlink()
    make_features(tmp_path, pipe, clips)
    assert last.read_bytes() == before
    with pytest.raises(cvg.ArgumentError, match="made with another recipe"):
        make_features(tmp_path, pipe, Clips(question, generated=12, read_steps=1, steps=2, seed=1))


def test_what_a_world_does_not_know_is_refused(tmp_path, capsys):
    with pytest.raises(cvg.ArgumentError, match="question must be one of number, relation, got 'colour'"):
        Clips("colour")
    for given, told in (
        (["--world", "scenes", "--clips", "3"], "--clips is not for --world scenes"),
        (["--question", "number"], "--question is not for --world shapes"),
    ):
        assert main(["cvg", "train", "--output", str(tmp_path / "run"), *given]) == 2
        assert told in capsys.readouterr().err
