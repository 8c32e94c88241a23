"""From words to the tokens that stand for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError

#: A word, or a word and which of its occurrences (0 is the first).
Word = str | tuple[str, int]


@dataclass(frozen=True)
class TokenSpan:
    """A word of a prompt and the positions of its tokens."""

    word: str
    occurrence: int
    ids: tuple[int, ...]  #: positions in the text encoder's sequence


def token_spans(tokenizer: Any, prompt: str, words: Sequence[Word]) -> list[TokenSpan]:
    """Finds words, or phrases, in a prompt and returns the positions of their tokens.

    Args:
        tokenizer: the pipeline's own.
        prompt: the text.
        words: each a word or phrase, upper and lower case alike, or a pair of it and its occurrence.

    Raises:
        ArgumentError: for a word that is not in the prompt (lists the words there), for an occurrence it does not
            have, or for one that the tokenizer cut off.
    """
    tokens = _token_offsets(tokenizer, prompt)
    spans = []
    for entry in words:
        word, occurrence = (entry, 0) if isinstance(entry, str) else entry
        places = list(re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE))
        if not word.strip() or not places:
            there = ", ".join(dict.fromkeys(re.findall(r"\w+", prompt)))
            raise ArgumentError(f"words: {word!r} is not in the prompt; the words there: {there}")
        if not 0 <= occurrence < len(places):
            raise ArgumentError(
                f"words: {word!r} occurs {len(places)} time(s) in the prompt, so its occurrence must be 0 to "
                f"{len(places) - 1}, got {occurrence}"
            )
        start, end = places[occurrence].span()
        ids = tuple(at for at, (low, high) in tokens.items() if low < end and high > start)
        if not ids:
            raise ArgumentError(
                f"words: {word!r} lies beyond the {_length(tokenizer)} tokens that the text encoder reads"
            )
        spans.append(TokenSpan(word, occurrence, ids))
    return spans


def prompt_token_ids(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Positions of all tokens of the prompt itself: neither begin, end nor padding."""
    return tuple(_token_offsets(tokenizer, prompt))


def check_reach(token_ids: torch.Tensor, length: int) -> None:
    """Checks that a denoiser is given the tokens whose maps are wanted: beyond them joint attention has the video's.

    Args:
        token_ids: on the host; elsewhere they are trusted, since a look at them would wait for the device.
        length: tokens of the text.

    Raises:
        ArgumentError: for a token beyond them: the pipeline was called with a `max_sequence_length` below the tokenizer's.
    """
    if token_ids.device.type == "cpu" and token_ids.numel() and int(token_ids.max()) >= length:
        raise ArgumentError(
            f"words: token {int(token_ids.max())} lies beyond the {length} tokens of text that the denoiser is given: "
            "shorten the prompt or raise max_sequence_length"
        )


def _length(tokenizer: Any) -> int:
    """The longest sequence the tokenizer makes; some state none, as a huge number."""
    return min(tokenizer.model_max_length, 1 << 20)


def _token_offsets(tokenizer: Any, prompt: str) -> dict[int, tuple[int, int]]:
    """Position of each token of the prompt → the characters it stands for."""
    options = {"truncation": True, "max_length": _length(tokenizer)}
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            prompt, return_offsets_mapping=True, return_special_tokens_mask=True, **options
        )
        return {
            at: tuple(offset)
            for at, (offset, special) in enumerate(
                zip(encoded.offset_mapping, encoded.special_tokens_mask, strict=True)
            )
            if not special
        }
    return _offsets_by_prefix(tokenizer, prompt, options)


def _offsets_by_prefix(tokenizer: Any, prompt: str, options: dict) -> dict[int, tuple[int, int]]:
    """Offsets from a tokenizer without them: the tokens of growing prefixes, word by word."""
    special = len(tokenizer("").input_ids)
    first = 1 if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else 0
    offsets, done = {}, 0
    for word in re.finditer(r"\w+|[^\w\s]+", prompt):
        count = len(tokenizer(prompt[: word.end()], **options).input_ids) - special
        offsets |= {first + at: word.span() for at in range(done, count)}
        done = max(done, count)
    return offsets
