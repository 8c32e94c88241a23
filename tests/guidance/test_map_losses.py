"""Vico's losses of maps: overlap of words, attributes bound to what they belong to; Attend-and-Excite's settings."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import binding_loss, concentration_loss, separation_loss  # noqa: E402
from cvg_kernels.guidance.losses import overlaps  # noqa: E402
from tests.offline_pipelines import animatediff, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def at(*places: int) -> torch.Tensor:
    """A map `[F=2, 1, 4]` that is even over some places."""
    one = torch.zeros(2, 1, 4, dtype=torch.float64)
    one[..., list(places)] = 0.3
    return one


def test_overlap_by_hand():
    maps = torch.stack([at(0), at(1), at(0, 1), at(0, 1, 2, 3)])[None]
    wanted = torch.tensor([[1, 0, 0.5, 0.25], [0, 1, 0.5, 0.25], [0.5, 0.5, 1, 0.5], [0.25, 0.25, 0.5, 1]]).double()
    torch.testing.assert_close(overlaps(maps)[0], wanted)
    off_diagonal = (wanted.sum() - 4) / 12
    torch.testing.assert_close(separation_loss(maps)[0], off_diagonal)


def test_frames_count_one_by_one():
    """Two words that are at one place at different times do not overlap."""
    first, second = at(0), at(1)
    turned = torch.stack([first[0], second[0]]), torch.stack([second[0], first[0]])
    assert float(separation_loss(torch.stack(turned)[None])) == 0


def test_binding_by_hand():
    red, circle, blue, square = at(0), at(0), at(1), at(1)
    bound = torch.stack([red, circle, blue, square])[None]
    pairs = [(0, 1), (2, 3)]
    assert float(binding_loss(bound, pairs)) == 0
    swapped = torch.stack([blue, circle, red, square])[None]
    assert float(binding_loss(swapped, pairs)) == 1 + 0.5
    chain = torch.stack([at(0), at(0), at(0)])[None]  # "big red circle": big is no stranger to circle
    assert float(binding_loss(chain, [(0, 1), (1, 2)])) == 0


def test_concentration_by_hand():
    """Of the most scattered word; frame by frame, and whatever a map's sum."""
    one, two, four = at(0), at(0, 1), at(0, 1, 2, 3)
    assert float(concentration_loss(torch.stack([one, one])[None])) == 0
    assert float(concentration_loss(torch.stack([one, two])[None])) == 0.5
    assert float(concentration_loss(torch.stack([7 * four, two, one])[None])) == 0.75
    changing = torch.stack([one[0], four[0]])  # at one place, then at four
    torch.testing.assert_close(float(concentration_loss(changing[None, None])), 1 - (1 + 0.25) / 2)


@pytest.mark.parametrize(
    "loss",
    [concentration_loss, separation_loss, lambda maps: binding_loss(maps, [(0, 1)])],
    ids=["gathered", "apart", "bound"],
)
def test_gradients(loss):
    maps = (torch.rand(2, 4, 3, 2, 3, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(loss, maps)


def test_a_word_without_a_map_is_no_nan():
    maps = torch.zeros(1, 2, 2, 2, 2).requires_grad_()
    loss = separation_loss(maps) + concentration_loss(maps)
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.drawn(3)
@pytest.mark.parametrize("flow", ["cross", "soft", "exact", "rollout"])
@pytest.mark.parametrize("loss", ["concentration", "separation", "binding"])
def test_the_loss_falls(loss, flow):
    pipe, options = animatediff()
    options = {**options, "prompt": "a small cat and a large dog"}
    words = ["small", "cat", "large", "dog"]
    vico = cvg.Vico(words, loss=loss, flow=flow, iterations=6, step_size=0.005, stop=0.3)
    with vico.attach(pipe) as made:
        run(pipe, options)
    losses = [float(entry["loss"]) for entry in made.history]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert set(made.history[0]["scores"][0]) == set(words)


def test_what_the_losses_need_is_named():
    pipe, options = animatediff()
    options = {**options, "prompt": "a small cat and a large dog"}
    for words, loss, match in (
        (["cat", "dog"], "binding", "directly before .*got cat, dog"),
        (["cat"], "separation", "needs two words at least, got cat"),
    ):
        with pytest.raises(cvg.ArgumentError, match=match), cvg.Vico(words, loss=loss).attach(pipe):
            run(pipe, options)
    with pytest.raises(cvg.ArgumentError, match="flow='exact' with spatial=True has none"):
        cvg.Vico(loss="separation", flow="exact", spatial=True)


def test_attend_and_excite():
    """Its score is the peak of the smoothed cross-attention of the weakest word, its step a plain one that shrinks."""
    vico = cvg.Vico.attend_and_excite(["cat", "dog"], step_size=0.0)
    assert (vico.flow, vico.step_rule, vico.loss) == ("cross", "sgd", "min")
    pipe, options = animatediff()
    stock = run(pipe, options)
    with vico.attach(pipe) as made:
        assert torch.equal(run(pipe, options), stock)
    entry = made.history[0]
    weakest = min(float(score) for score in entry["scores"][0].values())
    torch.testing.assert_close(float(entry["loss"]), 1 - weakest)
