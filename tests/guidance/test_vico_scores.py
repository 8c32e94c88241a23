"""What Vico scores: which tokens share the softmax, in what order the flow's products are taken, which words count."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.prompts.token_table import TokenTable  # noqa: E402
from cvg_kernels.prompts.tokens import EncodedText  # noqa: E402
from tests.offline_pipelines import PROMPT, animatediff, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["cat", "dog"]


def guide(words, **options) -> cvg.Vico:
    """Vico on the first half of the steps, one update each, unless said otherwise."""
    return cvg.Vico(words, **{"stop": 0.5, "iterations": 1, **options})


def scored(vico):
    """The scores of the words, and the loss, at the first evaluation on a fresh AnimateDiff."""
    pipe, options = animatediff()
    with vico.attach(pipe) as made:
        run(pipe, options)
    return made.history[0]["scores"][0], float(made.history[0]["loss"])


@pytest.mark.drawn(8, of="long tests")
def test_sinks_are_left_out_of_the_token_softmax():
    """Fewer tokens share it: every word that stays gets more, and alone a word gets all of it."""
    all_share, _ = scored(guide(WORDS))
    without, _ = scored(guide(WORDS, sinks=["and", ("a", 1)]))
    among_words, _ = scored(guide(WORDS, sinks="others"))
    assert all(all_share[word] < without[word] < among_words[word] for word in WORDS)
    pipe, options = animatediff()
    with (
        pytest.raises(cvg.ArgumentError, match="sinks must leave the token softmax two tokens"),
        guide(["cat"], sinks="others").attach(pipe),
    ):
        run(pipe, options)
    with (
        pytest.raises(cvg.ArgumentError, match=r"sinks must not hold a whole word of words, got"),
        guide(WORDS, sinks=["dog"]).attach(pipe),
    ):
        run(pipe, options)
    with pytest.raises(cvg.ArgumentError, match="sinks must be one of 'others', got 'and'"):
        guide(WORDS, sinks="and")


def test_a_saturated_score_names_its_sinks():
    """Once a run; not if the sink is left out, nor where the bare flow is the score."""
    pipe, options = animatediff()
    vico = guide(WORDS, sharpness=1e6)  # whatever is largest takes all

    def warned(method, prompt):
        with warnings.catch_warnings(record=True) as caught, method.attach(pipe):
            warnings.simplefilter("always")
            run(pipe, options, prompt)
        return [str(w.message) for w in caught if "score is saturated" in str(w.message)]

    told = warned(vico, PROMPT)
    if told:  # random weights: a word that is balanced may be the sink itself
        assert len(told) == 1 and "sinks='others'" in told[0]
    tables = replace(vico, words=["cat"])
    levels = [torch.tensor([[0.01, 0.95, 0.02, 0.01, 0.0, 0.01, 0.0]])]

    class Call:
        texts = [EncodedText.of_prompt(pipe.tokenizer, PROMPT)]

    table = TokenTable.of([Call.texts[0].find(["cat"])], among=[Call.texts[0].ids])
    with pytest.warns(cvg.GuidanceWarning, match="'red' took at least 95% .* no balanced word has"):
        tables._tell(levels, table, Call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(tables, normalize=False)._tell(levels, table, Call)
        tables._tell([levels[0], torch.full((1, 7), 0.1)], table, Call)  # not at every level
        tables._tell([torch.tensor([[0.0, 0.02, 0.95, 0.0, 0.0, 0.0, 0.0]])], table, Call)


@pytest.mark.drawn(8, of="long tests")
def test_the_order_of_the_soft_products():
    """Another number for the soft form, the same for the hard one; the released settings have the released order."""
    soft = [scored(guide(WORDS, order=order)) for order in ("tokens_first", "hops_first")]
    hard = [scored(guide(WORDS, flow="hard", order=order)) for order in ("tokens_first", "hops_first")]
    assert soft[0][1] != soft[1][1]
    assert hard[0][1] == pytest.approx(hard[1][1], abs=1e-6)
    assert cvg.Vico.released().order == "hops_first" and cvg.Vico().order == "tokens_first"


def test_words_by_part_of_speech():
    pipe, options = animatediff()
    with guide("nouns_and_verbs").attach(pipe) as made:
        run(pipe, options)
    assert set(made.history[0]["scores"][0]) == {"cat", "dog"}  # no colours
    with pytest.raises(
        cvg.ArgumentError, match="words must be a list of words, .* 'content' or 'nouns_and_verbs', got"
    ):
        cvg.Vico(words="adverbs")
