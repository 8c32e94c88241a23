"""The classifier that ships: small, of the pipeline that ships, and guidance by it does what it says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.composition import CompositionClassifier  # noqa: E402
from cvg_kernels.guidance.cvg import SHIPPED  # noqa: E402
from cvg_kernels.guidance.methods import method_named  # noqa: E402
from cvg_kernels.shapes.edit_direction import direction_guidance  # noqa: E402
from cvg_kernels.shapes.pipeline import load_pipeline, sample  # noqa: E402
from cvg_kernels.shapes.world import DIRECTIONS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "a red circle moving left and a blue square moving right"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_it_is_small_and_fits(pipe):
    classifier = CompositionClassifier.load(SHIPPED, pipe)
    assert set(DIRECTIONS) < set(classifier.labels)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 3 * 2**20
    assert {"right_prompt", "wrong_prompt", "generated"} <= set(classifier.report)


def test_guidance_raises_what_it_is_asked_for(pipe):
    """The labels are read from the prompt, and their probabilities rise with the updates of a step."""
    with cvg.CVG(steps=1, iterations=4, step_size=0.03).attach(pipe) as run:
        sample(pipe, [PROMPT], [3], steps=2)
    losses = [float(entry["loss"]) for entry in run.history]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert list(run.history[0]["scores"][0]) == ["red circle", "blue square"]


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", ["cvg", "cvg+vico"])
def test_by_name(pipe, name):
    clip = sample(pipe, [PROMPT], [0], guidance=method_named(name), steps=2)
    assert clip.shape == (1, 8, 3, 64, 64) and torch.isfinite(clip).all()
    assert not torch.equal(clip, sample(pipe, [PROMPT], [0], steps=2))


def test_a_prompt_that_says_no_direction(pipe):
    with pytest.raises(cvg.ArgumentError, match="label must be given"):
        sample(pipe, ["a red circle"], [0], guidance=cvg.CVG(), steps=2)


def test_it_can_be_taken_to_the_editor_which_it_does_not_fit_by_itself():
    editor = cvg.shapes.load_editor()
    own = cvg.CVG().reader
    with pytest.raises(cvg.ArgumentError, match="does not fit the pipeline"):
        cvg.CVG().check(editor)
    taken = own.taken_to(editor)
    cvg.CVG(taken).check(editor)
    with pytest.raises(cvg.ArgumentError, match="does not fit"):
        own.check(editor)  # as it was
    assert taken.labels == own.labels
    with pytest.raises(cvg.ArgumentError, match="pipe must have the layers"):
        own.taken_to(torch.nn.Linear(2, 2))


@pytest.mark.drawn(8, of="long tests")
def test_a_direction_is_scored_without_and_with_it(monkeypatch):
    monkeypatch.setattr("cvg_kernels.shapes.edit_arms.STEPS", 10)
    found = direction_guidance(cvg.shapes.load_editor(), edits=2, seed=5)
    assert found["edits"] == 2 and found["guided_steps"] >= 1
    assert found["without"]["n"] == found["with_cvg"]["n"] == 2
