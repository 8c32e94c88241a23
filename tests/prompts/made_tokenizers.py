"""Tokenizers of every kind that text encoders have, made without a network."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from tests.offline_pipelines import word_tokenizer

_WORDS = "a red cat dog boat boats and blue thing the moving".split()  # noqa: SIM905
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'-<>_ßéèáïüö"


def clip_like(length: int = 77, pad: str | None = None) -> CLIPTokenizer:
    """Byte pairs with `</w>`; pads with its end token, unless told to pad with another."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    merges = []
    for letter in pre_tokenizers.ByteLevel.alphabet():
        for token in (letter, letter + "</w>"):
            vocabulary[token] = len(vocabulary)
    for word in _WORDS:
        done = word[0]
        for at, letter in enumerate(word[1:], 2):
            letter += "</w>" if at == len(word) else ""
            merges.append((done, letter))
            done += letter
            vocabulary.setdefault(done, len(vocabulary))
    made = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad or "<|endoftext|>")
    made.model_max_length = length
    return made


def t5_like(length: int = 77) -> T5Tokenizer:
    """Unigrams with `▁` for the space before a word."""
    words = [f"▁{word}" for word in _WORDS] + ["一只", "红色", "的", "猫", "和", "蓝色", "狗", "の", "日本"]
    letters = [*_LETTERS, *"แมวสีดง", "\u0301"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    vocabulary += [(word, -3.0) for word in words] + [(letter, -6.0) for letter in letters]
    made = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    made.model_max_length = length
    return made


def byte_level(length: int = 77) -> PreTrainedTokenizerFast:
    """Byte pairs with `Ġ`, as language models have: no begin or end, and a token for each byte of most characters."""
    vocabulary = {"<|pad|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    merges = []
    for letter in pre_tokenizers.ByteLevel.alphabet():
        vocabulary[letter] = len(vocabulary)
    for word in _WORDS:
        done = "Ġ"
        for letter in word:
            merges.append((done, letter))
            done += letter
            vocabulary.setdefault(done, len(vocabulary))
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=length,
    )


class _Slow(PreTrainedTokenizer):
    """A tokenizer in Python, which knows no offsets; splits and joins as a fast one does."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        super().__init__(
            model_max_length=fast.model_max_length,
            **{name: one for name in names if (one := getattr(fast, name)) is not None},
        )

    @property
    def vocab_size(self) -> int:
        return len(self._fast)

    def get_vocab(self) -> dict[str, int]:
        return {**self._fast.get_vocab(), **self.added_tokens_encoder}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return self._fast.tokenize(text, add_special_tokens=False)

    def _convert_token_to_id(self, token: str) -> int:
        return self._fast.convert_tokens_to_ids(token)

    def _convert_id_to_token(self, at: int) -> str:
        return self._fast.convert_ids_to_tokens(at)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._fast.decode([self._convert_token_to_id(token) for token in tokens])

    def build_inputs_with_special_tokens(self, ids: list[int], more: Any = None) -> list[int]:
        around = self._fast("").input_ids
        begin = around[: len(around) // 2]
        return [*begin, *ids, *around[len(begin) :]]


def slow(fast: Any) -> PreTrainedTokenizer:
    """A tokenizer without offsets that makes the tokens of another."""
    return _Slow(fast)


KINDS = {
    "clip": clip_like,
    "t5": t5_like,
    "bytes": byte_level,
    "words": lambda length=77: word_tokenizer(length),
    "slow clip": lambda length=77: slow(clip_like(length)),
    "slow t5": lambda length=77: slow(t5_like(length)),
    "slow bytes": lambda length=77: slow(byte_level(length)),
    "slow words": lambda length=77: slow(word_tokenizer(length)),
}
#: Those that have a token for every text.
COMPLETE = [kind for kind in KINDS if "words" not in kind]
