"""Words among what a text encoder was given: begin, end and cut-off, changed prompts, and what is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.prompts.tokens import BEGIN, END, EncodedText  # noqa: E402
from tests.offline_pipelines import PROMPT, word_tokenizer  # noqa: E402
from tests.prompts.made_tokenizers import byte_level, clip_like, slow, t5_like  # noqa: E402
from tests.prompts.spans import characters, found, ids, in_encoder  # noqa: E402

# Begin, end and cut-off.


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("clip", ("<|startoftext|>", "<|endoftext|>")),
        ("slow clip", ("<|startoftext|>", "<|endoftext|>")),
        ("words", ("<bos>", "</s>")),
        ("t5", (None, "</s>")),
        ("slow t5", (None, "</s>")),
        ("bytes", (None, None)),
    ],
)
def test_begin_and_end(tokenizers, kind, names):
    tokenizer = tokenizers[kind]
    own = EncodedText.of_prompt(tokenizer, "a red cat")
    count = len(own.ids)
    assert count == 3
    for text in (own, in_encoder(tokenizer, "a red cat")):
        for generic, name, at in ((BEGIN, names[0], 0), (END, names[1], text.ids[-1] + 1)):
            if name is None:
                with pytest.raises(ArgumentError, match=f"the text encoder has no {generic[1:-1]}"):
                    text.find([generic])
            else:
                assert [span.ids for span in text.find([generic, name])] == [(at,), (at,)]
        assert [span.ids for span in text.all_words()] == [(at,) for at in text.ids]


def test_another_token_of_padding_than_the_end():
    tokenizer = clip_like(pad="!")
    (end,) = in_encoder(tokenizer, "a cat").find([END])
    assert end.ids == (3,)


def test_an_end_that_is_a_word_of_the_prompt(tokenizers):
    text = EncodedText.of_prompt(tokenizers["t5"], "a <end> cat")
    assert found(text, END) == "<end>"
    assert text.end not in text.find([END])[0].ids


def test_a_begin_has_one_occurrence(tokenizers):
    with pytest.raises(ArgumentError, match=r"'<begin>' occurs 1 time\(s\)"):
        ids(tokenizers["clip"], "a cat", (BEGIN, 1))


@pytest.mark.parametrize("make", [word_tokenizer, lambda length: slow(word_tokenizer(length))])
def test_a_word_that_was_cut_off(make):
    with pytest.raises(ArgumentError, match="'dog' lies beyond the 6 tokens"):
        ids(make(6), PROMPT, "dog")
    assert ids(make(6), PROMPT, "cat") == [(3,)]


def test_what_was_cut_off_is_not_taken_for_what_was_kept():
    """Read back, the tokens kept are the end of the prompt as well as its beginning."""
    prompt = "a cat zebra and a dog a cat and a dog"
    assert ids(slow(word_tokenizer(6)), prompt, "cat", "zebra", "and") == [(2,), (3,), (4,)]


def test_a_word_cut_off_from_other_ids():
    """The ids are no tokens of the prompt, which says all the same what is missing."""
    tokenizer = clip_like()
    kept = [*tokenizer("the red cat").input_ids[:-1], 1]
    with pytest.raises(ArgumentError, match="'dog' lies beyond the 5 tokens"):
        EncodedText.of_ids(tokenizer, kept, "The red, red cat and a dog").find(["dog"])
    padded = [*kept, 1, 1, 1]
    with pytest.raises(ArgumentError, match="'dog' is in the prompt, but the pipeline changed it"):
        EncodedText.of_ids(tokenizer, padded, "The red, red cat and a dog").find(["dog"])


# What pipelines do to a prompt.


@pytest.mark.parametrize("make", [clip_like, lambda: slow(clip_like()), t5_like, byte_level])
def test_textual_inversion(make):
    tokenizer = make()
    tokens = ["<thing>", "<thing>_1", "<thing>_2"]
    tokenizer.add_tokens(tokens)

    def convert(text):
        return text.replace("<thing>", " ".join(tokens))

    prompt = "a <thing> and a blue dog"
    given = tokenizer(convert(prompt), padding="max_length", truncation=True).input_ids
    text = EncodedText.of_ids(tokenizer, given, prompt)
    dog, thing = text.find(["dog", "<thing>"], convert)
    assert tokenizer.convert_ids_to_tokens([given[at] for at in thing.ids]) == tokens
    assert characters(text, dog) == "dog"
    assert (thing.word, thing.label) == ("<thing>", "<thing>")
    assert len(text.find(["<thing>"])[0].ids) == 1


def test_a_template_around_the_prompt():
    tokenizer = byte_level()
    template = "<|im_start|>Tell of the cat in the video<|im_end|><|im_start|>a red cat and a dog"
    given = tokenizer(template, padding="max_length").input_ids
    text = EncodedText.of_ids(tokenizer, given, "a red cat and a dog")
    assert text.text == "a red cat and a dog"
    assert [span.word for span in text.all_words()][:3] == ["a", "red", "cat"]
    (cat,) = text.find(["cat"])
    assert tokenizer.decode([given[at] for at in cat.ids]).strip() == "cat"
    assert cat.ids[0] > given.index(2)  # behind the instruction


def test_small_letters_and_other_cleaning():
    """The ids are those of a cleaned prompt; words are found however the caller spells them."""
    tokenizer = t5_like()
    given = tokenizer("a red cat", padding="max_length").input_ids
    text = EncodedText.of_ids(tokenizer, given, "A  RED (cat)")
    assert [span.ids for span in text.find(["RED", "Cat"])] == [(1,), (2,)]


def test_padding_on_the_left():
    tokenizer = byte_level()
    given = [0, 0, *tokenizer("a cat").input_ids]
    for prompt in ("a cat", None):
        text = EncodedText.of_ids(tokenizer, given, prompt)
        assert text.find(["cat"])[0].ids == (3,)


# All words, and what is refused.


def test_all_words():
    text = EncodedText.of_prompt(word_tokenizer(16), PROMPT)
    labels = ["a", "red", "cat", "and", "a#1", "blue", "dog"]
    assert [span.label for span in text.all_words()] == labels
    assert [span.ids for span in text.all_words()] == [(at,) for at in range(1, 8)]


def test_all_words_when_tokens_are_parts_of_characters(tokenizers):
    spans = EncodedText.of_prompt(tokenizers["bytes"], "猫").all_words()
    assert [span.label for span in spans] == ["猫", "猫#1", "猫#2"]


def test_too_high_an_occurrence():
    with pytest.raises(ArgumentError, match=r"occurs 2 time\(s\) .* 0 to 1, got 2"):
        ids(word_tokenizer(16), PROMPT, ("a", 2))


def test_the_nearest_words_are_named():
    with pytest.raises(ArgumentError, match="there: a, Red, cat, and, blue, dog; nearest: 'Red'"):
        ids(word_tokenizer(16), "a Red cat and a blue dog", "redd")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([5], "words must hold words or pairs .* got 5"),
        ([("cat",)], r"words must hold .* got \('cat',\)"),
        ([("cat", "x")], r"words must hold .* got \('cat', 'x'\)"),
        ([("cat", 1.0)], "words must hold"),
        ([None], "words must hold .* got None"),
        ([("cat", -1)], "occurrence of 'cat' must be 0 .* got -1"),
        ([("cat", True)], "occurrence of 'cat' must be 0 .* got True"),
        ([""], "words must not hold an empty word, got ''"),
        (["cat", " \n"], "words must not hold an empty word"),
        ("cat", "words must be a list of words, got 'cat'"),
    ],
)
def test_words_that_are_none(words, message):
    with pytest.raises(ArgumentError, match=message):
        EncodedText.of_prompt(word_tokenizer(16), PROMPT).find(words)


@pytest.mark.parametrize("given", [[], ["cat"], [[1, 2], [3, 4]]])
def test_ids_that_are_none(given):
    with pytest.raises(ArgumentError, match="ids must be the token ids of one text"):
        EncodedText.of_ids(word_tokenizer(16), given)
