"""Words to tokens."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from cvg_kernels.capture.tokens import prompt_token_ids, token_spans  # noqa: E402

from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.shapes.model import build_tokenizer  # noqa: E402
from tests.offline_pipelines import PROMPT, word_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A byte-pair tokenizer that knows some words and spells the others."""
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ids(tokenizer, prompt, *words):
    return [span.ids for span in token_spans(tokenizer, prompt, words)]


def test_a_token_a_word():
    assert ids(word_tokenizer(16), PROMPT, "cat", "dog", "red cat") == [(3,), (7,), (2, 3)]


def test_occurrences_and_case():
    assert ids(word_tokenizer(16), PROMPT, "a", ("a", 1), "CAT") == [(1,), (5,), (3,)]


def test_a_word_of_several_tokens(pieces):
    prompt = "a red hexagon, moving left"
    ((first, *_, last),) = ids(pieces, prompt, "hexagon")
    assert (first, last) == (3, 9)
    assert prompt_token_ids(pieces, prompt) == tuple(range(1, 13))


def test_a_word_is_not_found_inside_another(pieces):
    with pytest.raises(
        ArgumentError, match="'hex' is not in the prompt; the words there: a, red, hexagon"
    ):
        token_spans(pieces, "a red hexagon", ["hex"])


def test_too_high_an_occurrence():
    with pytest.raises(ArgumentError, match=r"occurs 2 time\(s\) .* 0 to 1, got 2"):
        token_spans(word_tokenizer(16), PROMPT, [("a", 2)])


def test_a_word_that_was_cut_off():
    with pytest.raises(ArgumentError, match="'dog' lies beyond the 6 tokens"):
        token_spans(word_tokenizer(6), PROMPT, ["dog"])


def test_a_tokenizer_without_offsets(pieces):
    """Prefix by prefix gives what the offsets give."""

    class Slow:
        is_fast = False
        model_max_length = pieces.model_max_length
        bos_token_id = pieces.bos_token_id

        def __call__(self, text, **options):
            return pieces(text, **options)

    for prompt in ("a red hexagon moving left", "blue square"):
        assert prompt_token_ids(Slow(), prompt) == prompt_token_ids(pieces, prompt)
        word = prompt.split()[-1]
        assert ids(Slow(), prompt, word) == ids(pieces, prompt, word)
