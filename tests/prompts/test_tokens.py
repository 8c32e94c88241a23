"""Words to tokens: by every kind of tokenizer, from where a word begins to where it ends, and in its other forms."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.prompts.tokens import EncodedText  # noqa: E402
from cvg_kernels.shapes.model import build_tokenizer  # noqa: E402
from tests.offline_pipelines import PROMPT, word_tokenizer  # noqa: E402
from tests.prompts.made_tokenizers import COMPLETE, KINDS  # noqa: E402
from tests.prompts.spans import characters, found, ids, in_encoder  # noqa: E402

CHINESE = "一只红色的猫和一只蓝色的狗"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A byte-pair tokenizer that knows some words and spells the others."""
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


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


def test_glasses_are_glass_but_not_the_other_way_round(tokenizers):
    """The plural of "glass" is found, though "glasses" alone may be another thing."""
    text = EncodedText.of_prompt(tokenizers["bytes"], "two glasses")
    (span,) = text.find(["glass"])
    assert characters(text, span) == "glasses"


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
