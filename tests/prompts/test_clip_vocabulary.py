"""Words to tokens with CLIP's own vocabulary, and with a made one of the same kind, where each byte may be a token."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.prompts.tokens import BEGIN, END, EncodedText  # noqa: E402
from tests.prompts.aligned import by_bytes  # noqa: E402
from tests.prompts.clip_vocabulary import SlowCLIP, byte_letters, fast, table, write_files  # noqa: E402
from tests.prompts.made_tokenizers import clip_like, slow  # noqa: E402
from tests.prompts.spelled import WORDS  # noqa: E402

real = pytest.mark.skipif(table() is None, reason="open_clip is not there: pip install --no-deps open-clip-torch")
KINDS = [pytest.param("fast", marks=real), pytest.param("slow", marks=real)]

#: Where nothing but the ids is known, and they are the same with a space in the word and without it.
AMBIGUOUS = {"softball", "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {"made": clip_like(), "slow made": slow(clip_like())}
    if table() is None:
        return made
    folder = tmp_path_factory.mktemp("clip")
    write_files(folder)
    return made | {"fast": fast(folder), "slow": SlowCLIP(folder)}


def padded(tokenizer, prompt: str) -> list[int]:
    return tokenizer(prompt, padding="max_length", truncation=True, max_length=77).input_ids


def readings(tokenizer, prompt: str) -> dict[str, EncodedText]:
    """The text as it is read from the prompt, from the ids of a pipeline and the prompt, and from the ids alone."""
    given = padded(tokenizer, prompt)
    return {
        "prompt": EncodedText.of_prompt(tokenizer, prompt),
        "both": EncodedText.of_ids(tokenizer, given, prompt),
        "ids": EncodedText.of_ids(tokenizer, given),
    }


def tokens_of(tokenizer, prompt: str, there: str, occurrence: int = 0) -> tuple[int, ...]:
    """Positions of the tokens that hold the characters of what stands in a prompt."""
    start = -1
    for _ in range(occurrence + 1):
        start = prompt.index(there, start + 1)
    ids = tokenizer(prompt, truncation=True, max_length=77).input_ids
    tokens = [None, *tokenizer.convert_ids_to_tokens(ids[1:-1]), None]
    return by_bytes(tokens, byte_letters(), prompt, (start, start + len(there)))


@real
def test_the_tokens_are_those_of_clip(tokenizers):
    """The ids that every CLIP gives this prompt, and the same by both tokenizers for all prompts of this file."""
    for kind in ("fast", "slow"):
        assert tokenizers[kind]("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    for prompt in {prompt for prompt, _, _ in WORDS}:
        assert tokenizers["fast"](prompt).input_ids == tokenizers["slow"](prompt).input_ids


@pytest.mark.drawn(3)
@pytest.mark.parametrize("kind", ["made", "slow made", *KINDS])
@pytest.mark.parametrize(("prompt", "word", "there"), WORDS, ids=[f"{word} in {prompt}" for prompt, word, _ in WORDS])
def test_a_word_has_the_tokens_of_its_characters(tokenizers, kind, prompt, word, there):
    tokenizer = tokenizers[kind]
    wanted = tokens_of(tokenizer, prompt, there)
    found = {
        name: text.find([word])[0].ids
        for name, text in readings(tokenizer, prompt).items()
        if name != "ids" or word not in AMBIGUOUS
    }
    assert found == dict.fromkeys(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_how_many_tokens_a_word_has(tokenizers, kind):
    text = EncodedText.of_prompt(tokenizers[kind], "a photorealistic axolotl, a cat, an ice-cream, a t-shirt 🐱 猫")
    counts = {word: len(text.find([word])[0].ids) for word in ("cat", "ice-cream", "t-shirt", "🐱", "猫")}
    assert counts == {"cat": 1, "ice-cream": 3, "t-shirt": 3, "🐱": 1, "猫": 3}
    assert len(text.find(["axolotl"])[0].ids) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_occurrences(tokenizers, kind):
    prompt = "a cat, a Cat's bed and cats; cat-like CAT"
    for text in readings(tokenizers[kind], prompt).values():
        found = text.find(["cat", ("cat", 1), ("cat", 2), ("cat", 3)])
        assert [span.label for span in found] == ["cat", "cat#1", "cat#2", "cat#3"]
        wanted = [tokens_of(tokenizers[kind], prompt, *place) for place in (("cat",), ("Cat",), ("cat", 2), ("CAT",))]
        assert [span.ids for span in found] == wanted
        with pytest.raises(ArgumentError, match=r"'cat' occurs 4 time\(s\)"):
            text.find([("cat", 4)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["a red cat", "🐱", "猫", "", "a cat 🐱"])
def test_begin_and_end(tokenizers, kind, prompt):
    """CLIP pads with its end token: the first of them is the end."""
    last = len(tokenizers[kind](prompt).input_ids) - 1
    for text in readings(tokenizers[kind], prompt).values():
        assert [span.ids for span in text.find([BEGIN, END, "<|startoftext|>", "<|endoftext|>"])] == [
            (0,),
            (last,),
        ] * 2
        assert text.ids == tuple(range(1, last))


@pytest.mark.parametrize("kind", KINDS)
def test_words_beyond_the_limit(tokenizers, kind):
    prompt = "a red cat, " * 18 + "a dog and a zebra"  # 72 tokens, and the begin and the end
    texts = readings(tokenizers[kind], prompt)
    for name, text in texts.items():
        assert len(text.offsets) == 75
        assert text.find(["dog"])[0].ids == (74,)
        assert text.find([("cat", 17)])[0].ids == (71,)
        message = "'zebra' is not in the prompt" if name == "ids" else "'zebra' lies beyond the 77 tokens"
        with pytest.raises(ArgumentError, match=message):
            text.find(["zebra"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["axolotl", "ice-cream", "猫", "🦩🦩"])
def test_of_a_word_at_the_limit_there_is_what_was_kept(tokenizers, kind, word):
    size = len(tokenizers[kind](word).input_ids) - 2
    assert size > 1
    for kept in range(size + 1):
        prompt = "cat " * (75 - kept) + word
        for name, text in readings(tokenizers[kind], prompt).items():
            if kept:
                if name != "ids":
                    assert text.find([word])[0].ids == tuple(range(76 - kept, 76))
            else:
                with pytest.raises(
                    ArgumentError, match="is not in the prompt" if name == "ids" else "lies beyond the 77"
                ):
                    text.find([word])
