"""Words to tokens."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.prompts.tokens import BEGIN, END, EncodedText, TokenSpan  # noqa: E402
from cvg_kernels.shapes.model import build_tokenizer  # noqa: E402
from tests.offline_pipelines import PROMPT, word_tokenizer  # noqa: E402
from tests.prompts.made_tokenizers import COMPLETE, KINDS, byte_level, clip_like, slow, t5_like  # noqa: E402

CHINESE = "一只红色的猫和一只蓝色的狗"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A byte-pair tokenizer that knows some words and spells the others."""
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: make() for kind, make in KINDS.items()}


def ids(tokenizer, prompt, *words):
    return [span.ids for span in EncodedText.of_prompt(tokenizer, prompt).find(words)]


def characters(text: EncodedText, span: TokenSpan) -> str:
    """What the tokens of a word stand for."""
    spans = [text.offsets[at] for at in span.ids]
    return text.text[min(low for low, _ in spans) : max(high for _, high in spans)]


def found(text: EncodedText, word) -> str:
    (span,) = text.find([word])
    return characters(text, span)


def in_encoder(tokenizer, prompt: str) -> EncodedText:
    """The prompt as read from the ids of a padded sequence alone."""
    padded = tokenizer(prompt, padding="max_length", truncation=True, max_length=77)
    return EncodedText.of_ids(tokenizer, padded.input_ids)


# What every tokenizer is asked for.


def test_a_token_a_word():
    assert ids(word_tokenizer(16), PROMPT, "cat", "dog", "red cat") == [(3,), (7,), (2, 3)]


def test_occurrences_and_case():
    assert ids(word_tokenizer(16), PROMPT, "a", ("a", 1), "CAT") == [(1,), (5,), (3,)]


def test_a_word_of_several_tokens(pieces):
    prompt = "a red hexagon, moving left"
    ((first, *_, last),) = ids(pieces, prompt, "hexagon")
    assert (first, last) == (3, 9)
    assert EncodedText.of_prompt(pieces, prompt).ids == tuple(range(1, 13))


def test_labels():
    text = EncodedText.of_prompt(word_tokenizer(16), PROMPT)
    assert [span.label for span in text.find(["Cat", ("a", 1)])] == ["Cat", "a#1"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_encoder_was_given_is_the_prompt(tokenizers, kind):
    """With the prompt at hand its spelling is kept, and padding is no part of it."""
    tokenizer = tokenizers[kind]
    prompt = "a Red cat, the dog's T-shirt"
    own = EncodedText.of_prompt(tokenizer, prompt)
    padded = tokenizer(prompt, padding="max_length", truncation=True, max_length=30).input_ids
    given = EncodedText.of_ids(tokenizer, padded, prompt)
    assert (given.text, given.offsets, given.length) == (prompt, own.offsets, 30)
    assert (given.begin, given.end) == (own.begin, own.end)


@pytest.mark.parametrize("kind", COMPLETE)
@pytest.mark.parametrize("read", [EncodedText.of_prompt, in_encoder])
def test_every_kind_of_tokenizer_finds_every_word(tokenizers, kind, read):
    text = read(tokenizers[kind], "a Red hexagon, the cat's T-shirt 4k")
    for word in ("hexagon", "red", "cat", "4k", "T-shirt", "cat's t-shirt", "red hexagon"):
        assert found(text, word).lower().replace(" ", "") == word.lower().replace(" ", "")


@pytest.mark.parametrize("kind", COMPLETE)
@pytest.mark.parametrize("read", [EncodedText.of_prompt, in_encoder])
@pytest.mark.parametrize("word", ["猫", "红色", "狗", "蓝色的狗"])
def test_chinese(tokenizers, kind, read, word):
    text = read(tokenizers[kind], CHINESE)
    assert found(text, word) == word


@pytest.mark.parametrize("kind", ["words", "slow words"])
def test_unknown_words_are_found_in_the_prompt(tokenizers, kind):
    assert ids(tokenizers[kind], "a zebra and a red cat", "zebra", "cat") == [(2,), (6,)]


# Where a word begins and ends.


def test_a_word_is_not_found_inside_another(pieces):
    with pytest.raises(
        ArgumentError, match="'hex' is not in the prompt; the words there: a, red, hexagon; nearest: 'hexagon'"
    ):
        ids(pieces, "a red hexagon", "hex")


@pytest.mark.parametrize(
    ("prompt", "word", "there"),
    [
        ("日本の猫 and a cat", "猫", "猫"),
        ("猫cat", "cat", "cat"),
        ("3D猫", "猫", "猫"),
        ("แมวสีแดง", "แมว", "แมว"),
        ("a red\n cat", "red cat", "red\n cat"),
        ("a red  cat", "red cat", "red  cat"),
        ("a cat", " cat ", "cat"),
        ("cafe\u0301 cat", "caf\u00e9", "cafe\u0301"),
        ("caf\u00e9 cat", "cafe\u0301", "caf\u00e9"),
        ("a dog’s bone", "dog's bone", "dog’s bone"),
        ("a “red” cat", '"red" cat', "“red” cat"),
        ("a T‑shirt", "t-shirt", "T‑shirt"),
        ("a soft\u00adball", "softball", "soft\u00adball"),
        ("ｃａｔ", "cat", "ｃａｔ"),
        ("eine Straße", "STRASSE", "Straße"),
        ("in İstanbul a cat", "istanbul", "İstanbul"),
        ("in İstanbul a cat", "cat", "cat"),
        ("ßßß cat", "CAT", "cat"),
        ("a cat's toy", "cat", "cat"),
        ("a 고양이가 cat", "고양이", "고양이가"),
        ("बिल्ली और कुत्ता", "बिल्ली", "बिल्ली"),
    ],
)
@pytest.mark.parametrize("kind", ["clip", "bytes", "slow clip"])
def test_spellings(tokenizers, kind, prompt, word, there):
    """Offsets are those of the prompt as it was given, whatever its letters are folded to."""
    text = EncodedText.of_prompt(tokenizers[kind], prompt)
    (span,) = text.find([word])
    assert span.word == word
    # The first and last token may be a part of a character with its accents.
    low = min(text.offsets[at][0] for at in span.ids)
    high = max(text.offsets[at][1] for at in span.ids)
    at = prompt.index(there)
    assert low == at
    assert at + len(there) - 1 <= high <= at + len(there)


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("STRASSE", "s"),  # a letter of the folded text, but no word
        ("ß", "s"),
        ("cafe\u0301", "cafe"),
        ("a concatenation", "cat"),
        ("बिल्ली", "बिल"),
        ("4k", "4"),
    ],
)
def test_parts_of_words_are_not_found(tokenizers, prompt, word):
    with pytest.raises(ArgumentError, match="is not in the prompt"):
        ids(tokenizers["clip"], prompt, word)


# Other forms of a word.


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("boat", "boats"),
        ("box", "boxes"),
        ("city", "cities"),
        ("wolf", "wolves"),
        ("man", "men"),
        ("child", "children"),
        ("goose", "geese"),
        ("woman", "women"),
        ("bus", "buses"),
        ("knife", "knives"),
        ("leaf", "leaves"),
        ("tomato", "tomatoes"),
        ("toy", "toys"),
        ("mouse", "mice"),
        ("house", "houses"),
        ("quiz", "quizzes"),
        ("fox", "foxes"),
        ("person", "people"),
        ("match", "matches"),
        ("cookie", "cookies"),
        ("plane", "planes"),
        ("red boat", "red boats"),
        ("man in a hat", "men in a hat"),
        ("t-shirt", "t-shirts"),
    ],
)
def test_singular_and_plural_find_each_other(tokenizers, one, many):
    for asked, there in ((one, many), (many, one)):
        text = EncodedText.of_prompt(tokenizers["bytes"], f"two {there} at sea")
        (span,) = text.find([asked])
        assert (span.word, characters(text, span)) == (asked, there)


def test_the_word_itself_comes_first(tokenizers):
    prompt = "three boats and a boat"
    boats, boat = ids(tokenizers["words"], prompt, "boats", "boat")
    assert (boats, boat) == ((2,), (5,))
    with pytest.raises(ArgumentError, match=r"occurs 1 time\(s\)"):
        ids(tokenizers["words"], prompt, ("boat", 1))


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a new car", "news"),
        ("his dog", "hi"),
        ("a cafe", "caves"),
        ("a plan", "planes"),
        ("a glass", "glasses"),
        ("it is late", "i"),
        ("across the sea", "acros"),
    ],
)
def test_another_word_is_no_plural(tokenizers, prompt, word):
    with pytest.raises(ArgumentError, match="is not in the prompt"):
        ids(tokenizers["words"], prompt, word)


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


def test_glasses_are_glass_but_not_the_other_way_round(tokenizers):
    """The plural of "glass" is found, though "glasses" alone may be another thing."""
    text = EncodedText.of_prompt(tokenizers["bytes"], "two glasses")
    (span,) = text.find(["glass"])
    assert characters(text, span) == "glasses"
