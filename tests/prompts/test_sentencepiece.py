"""Words to tokens with pieces as T5 and UMT5 have them, trained here on a few sentences, so that they cut words."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast, T5Tokenizer  # noqa: E402

from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.prompts.tokens import END, EncodedText  # noqa: E402
from tests.prompts.aligned import by_pieces  # noqa: E402
from tests.prompts.made_tokenizers import slow  # noqa: E402
from tests.prompts.spelled import WORDS  # noqa: E402

_CORPUS = [
    "a red cat and a blue dog are playing in the garden, the cat's toys lie in the grass",
    "an astronaut rides a horse on the moon while two astronauts watch, it doesn't move",
    "ice-cream and t-shirts, well-known rock'n'roll bands; cars (red/blue) at 50 mph!",
    "le café de l'été est très naïf, une piñata mexicaine, Ångström und Straße, ein Hund läuft",
    "hexagonal shapes moving left, kaleidoscopes turning right, geese flying over a boat",
    "THE RED CAT AND A DOG, 3D R2-D2 robots and 4k video",
] * 4
_SPECIAL = ["<pad>", "</s>", "<unk>"]


def _normal():
    """What T5's table of characters does to these prompts."""
    return normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" +"), " "), normalizers.Strip()]
    )


@pytest.fixture(scope="module")
def vocabulary():
    """Pieces and their scores, the most useful 220."""
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = _normal(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=220, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(_CORPUS, trainer)
    return [(piece, score) for piece, score in json.loads(made.to_str())["model"]["vocab"]]


def _t5(vocabulary):
    """T5: characters it does not know are `<unk>`, neighbours together; 100 sentinels behind the vocabulary."""
    made = T5Tokenizer(vocab=[*vocabulary, *((f"<extra_id_{at}>", 0.0) for at in reversed(range(100)))])
    made.backend_tokenizer.normalizer = _normal()
    made.model_max_length = 77
    return made


def _umt5(vocabulary):
    """UMT5: characters it does not know are their bytes."""
    pieces = [*vocabulary, *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    made = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    made.normalizer, made.pre_tokenizer = _normal(), pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=77, **names)


@pytest.fixture(scope="module")
def tokenizers(vocabulary):
    made = {"t5": _t5(vocabulary), "umt5": _umt5(vocabulary)}
    return made | {f"slow {kind}": slow(one) for kind, one in made.items()}


KINDS = ["t5", "umt5", "slow t5", "slow umt5"]
#: Pieces of T5 know neither where unknown characters begin nor what they are, and its table drops what is not seen.
LATIN = [
    case
    for case in WORDS
    if all(ord(one) < 0x250 or one in "\u2011’\u0301\u0302\u0303\u0308\u030a—" for one in case[0])
]


def pieces(tokenizer, prompt: str) -> list[str | None]:
    ids = tokenizer(prompt, truncation=True, max_length=77).input_ids
    return [*tokenizer.convert_ids_to_tokens(ids[:-1]), None]


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "word", "there"), LATIN, ids=[f"{word} in {prompt}" for prompt, word, _ in LATIN])
def test_a_word_has_the_pieces_of_its_characters(tokenizers, kind, prompt, word, there):
    tokenizer = tokenizers[kind]
    at = prompt.index(there)
    wanted = by_pieces(pieces(tokenizer, prompt), prompt, (at, at + len(there)))
    given = tokenizer(prompt, padding="max_length", truncation=True, max_length=77).input_ids
    assert EncodedText.of_prompt(tokenizer, prompt).find([word])[0].ids == wanted
    assert EncodedText.of_ids(tokenizer, given, prompt).find([word])[0].ids == wanted
    if "<unk>" in pieces(tokenizer, prompt):
        return  # what was unknown cannot be read back
    assert EncodedText.of_ids(tokenizer, given).find([word])[0].ids == wanted


@pytest.mark.parametrize("kind", ["umt5", "slow umt5"])
@pytest.mark.parametrize(
    ("prompt", "word"),
    [("a 🐱 plays", "🐱"), ("一只红色的猫和狗", "红色"), ("cat🐱dog", "🐱"), ("МОСКВА зима", "зима")],
)
def test_characters_of_several_bytes(tokenizers, kind, prompt, word):
    tokenizer, at = tokenizers[kind], prompt.index(word)
    wanted = by_pieces(pieces(tokenizer, prompt), prompt, (at, at + len(word)))
    given = tokenizer(prompt, padding="max_length", truncation=True, max_length=77).input_ids
    for text in (
        EncodedText.of_prompt(tokenizer, prompt),
        EncodedText.of_ids(tokenizer, given, prompt),
        EncodedText.of_ids(tokenizer, given),
    ):
        assert text.find([word])[0].ids == wanted


@pytest.mark.parametrize("kind", ["t5", "slow t5"])
def test_unknown_words_are_found_in_the_prompt(tokenizers, kind):
    """T5 reads "<unk>" for each of them, and the words around them stay where they are."""
    tokenizer = tokenizers[kind]
    prompt = "a red 猫 and a 🐱 in the garden"
    tokens = pieces(tokenizer, prompt)
    assert tokens.count("<unk>") == 2
    places = [at for at, token in enumerate(tokens) if token == "<unk>"]
    given = tokenizer(prompt, padding="max_length", truncation=True, max_length=77).input_ids
    for text in (EncodedText.of_prompt(tokenizer, prompt), EncodedText.of_ids(tokenizer, given, prompt)):
        assert [span.ids for span in text.find(["猫", "🐱"])] == [(at,) for at in places]
        (garden,) = text.find(["garden"])
        assert "".join(tokens[at] for at in garden.ids).lstrip("▁") == "garden"


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_and_the_limit(tokenizers, kind):
    tokenizer = tokenizers[kind]
    prompt = "a cat " * 40 + "and a dog"
    text = EncodedText.of_prompt(tokenizer, prompt)
    assert text.find([END])[0].ids == (76,)
    with pytest.raises(ArgumentError, match="'dog' lies beyond the 77 tokens"):
        text.find(["dog"])
