"""From the words of a prompt to the positions of their tokens in the text encoder's sequence."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from cvg_kernels.errors import ArgumentError, is_whole
from cvg_kernels.prompts import encoding
from cvg_kernels.prompts.encoding import Encoding, Template
from cvg_kernels.prompts.inflection import other_forms
from cvg_kernels.prompts.matching import FoldedText, fold, words_in

#: As words, the tokens that a text encoder has before and after the prompt.
BEGIN, END = "<begin>", "<end>"


@dataclass(frozen=True)
class TokenSpan:
    """A word of a prompt and the positions of its tokens.

    Attributes:
        word: as the caller gave it.
        occurrence: which of its occurrences.
        ids: positions in the text that the denoiser is given, or in a text encoder's sequence.

    Examples:
        >>> cvg.TokenSpan("cat", 1, (4, 5)).label
        'cat#1'
    """

    word: str
    occurrence: int
    ids: tuple[int, ...]

    @property
    def label(self) -> str:
        """The name of the word; a later occurrence carries its number: "cat", "cat#1"."""
        return self.word if self.occurrence == 0 else f"{self.word}#{self.occurrence}"


#: A word or phrase, or that and which of its occurrences (0 is the first); or a span that says itself where its tokens
#: are.
Word = str | tuple[str, int] | TokenSpan


@dataclass(frozen=True)
class EncodedText:
    """A text as the text encoder sees it: its characters and the characters of each token.

    Attributes:
        text: the prompt, or what was put together again from the ids of its tokens.
        offsets: position of each of the prompt's own tokens → the characters it stands for. A token that is only a
            space stands for none; a character of several bytes may have several tokens.
        begin: position of the token that marks the beginning, where there is one.
        end: position of the token that marks the end, the first after the prompt.
        length: number of tokens of the sequence.
        begin_name: how the tokenizer spells the begin token.
        end_name: how it spells the end token.
        prompt: what the caller says the prompt is, where the text was put together from ids.
    """

    text: str
    offsets: dict[int, tuple[int, int]]
    begin: int | None
    end: int | None
    length: int
    begin_name: str | None = None
    end_name: str | None = None
    prompt: str | None = None

    @classmethod
    def of_prompt(cls, tokenizer: Any, prompt: str) -> EncodedText:
        """Tokenises a prompt, cut off at the tokenizer's length.

        Args:
            tokenizer: the pipeline's own, fast or slow, or a processor that has one.
            prompt: the text.
        """
        tokenizer = _text_tokenizer(tokenizer)
        return cls._of(tokenizer, encoding.encode(tokenizer, prompt))

    @classmethod
    def of_ids(
        cls,
        tokenizer: Any,
        ids: Sequence[int],
        prompt: str | None = None,
        template: Template | Callable[[], Template] | None = None,
    ) -> EncodedText:
        """Reads the ids that the text encoder was really given: cleaned, rewritten, in a template, padded.

        Args:
            tokenizer: the pipeline's own, or a processor that has one.
            ids: token ids of one sample, padding and all; a list or a tensor `[T]`.
            prompt: if its tokens are these ids, its spelling is kept; if a template holds it, the rest is left out.
            template: the template's tokens, or what finds them out; without it, the prompt is looked for in the text.

        Raises:
            ArgumentError: for ids of another form.
        """
        tolist = getattr(ids, "tolist", None)
        ids = list(ids) if tolist is None else tolist()
        if not ids or not all(is_whole(one) for one in ids):
            raise ArgumentError(f"ids must be the token ids of one text, a list of integers, got {_shown(ids)}")
        tokenizer = _text_tokenizer(tokenizer)
        if prompt is None:
            return cls._of(tokenizer, encoding.decode(tokenizer, ids))
        same = encoding.shifted(encoding.encode(tokenizer, prompt, len(ids)), ids, tokenizer)
        if same is not None:
            return cls._of(tokenizer, same)
        if template is None:
            inside = encoding.standing(tokenizer, prompt, ids)
        else:
            known = template if isinstance(template, Template) else template()
            inside = known.inside(tokenizer, ids)
        encoded = replace(cls._of(tokenizer, encoding.decode(tokenizer, ids, inside)), prompt=prompt)
        return encoded if inside else encoded._without_template()

    def placed(self, rows: Sequence[int | None]) -> EncodedText:
        """The text as its tokens stand in what a pipeline makes of the text encoder's output.

        Args:
            rows: per token of that, its position in the text encoder's sequence, or `None` for what is not of it.
        """
        offsets = {index: self.offsets[row] for index, row in enumerate(rows) if row in self.offsets}
        begin, end = (
            None if marker is None or marker not in rows else list(rows).index(marker)
            for marker in (self.begin, self.end)
        )
        return replace(self, offsets=offsets, begin=begin, end=end, length=len(rows))

    @classmethod
    def _of(cls, tokenizer: Any, encoded: Encoding) -> EncodedText:
        names = [
            None if index is None else tokenizer.convert_ids_to_tokens(encoded.ids[index])
            for index in (encoded.begin, encoded.end)
        ]
        return cls(encoded.text, encoded.offsets, encoded.begin, encoded.end, len(encoded.ids), *names)

    def _without_template(self) -> EncodedText:
        """The text without the template around the prompt, if there is one."""
        place = self._place_of_prompt()
        if place is None:
            return self
        start, end = place
        offsets = {
            index: (max(low, start) - start, min(high, end) - start)
            for index, (low, high) in self.offsets.items()
            if low < end and high > start
        }
        return replace(self, text=self.text[start:end], offsets=offsets)

    def _place_of_prompt(self) -> tuple[int, int] | None:
        """Characters of the prompt, or of as much of it as was kept, in the text of a template."""
        if self.prompt is None:
            return None
        text = self._folded
        places = text.places([self.prompt])
        if places:
            return places[-1]  # instructions come before what they are about
        for _, end in reversed(words_in(self.prompt)):
            places = text.places([self.prompt[:end]])
            rest = fold(self.prompt[end:]).lstrip()
            if places and rest.startswith(fold(self.text[places[-1][1] :]).strip()):
                return places[-1][0], len(self.text)
        return None

    @property
    def ids(self) -> tuple[int, ...]:
        """Positions of all tokens of the prompt itself: neither begin, end nor padding."""
        return tuple(self.offsets)

    def find(self, words: Sequence[Word], convert: Callable[[str], str] | None = None) -> list[TokenSpan]:
        """Finds words, or phrases, and the positions of their tokens.

        Upper and lower case are alike, as are composed and decomposed accents, kinds of quotation mark and hyphen, and
        any white space between the words of a phrase. A word is not found inside another, except in scripts that have
        no spaces. If the text does not have a word as it is, its plural or singular is found. `BEGIN` and `END`, or
        the tokenizer's own spelling of them, are the tokens around the prompt.

        Args:
            words: each a word or phrase, or a pair of it and its occurrence; a `TokenSpan` stays as it is.
            convert: how the pipeline rewrites a text before it tokenises it (`pipe.maybe_convert_prompt` makes the
                several tokens of a textual inversion of its one name).

        Raises:
            ArgumentError: for an entry that is no word, a word that is not in the text (names the nearest, lists those
                there), an occurrence it does not have, one that was cut off, or a begin or end token that is not
                there.
        """
        spans = []
        for one in checked_words(words):
            word, occurrence = word_and_occurrence(one)
            known = isinstance(one, TokenSpan)
            ids = one.ids if known else self._ids_of(word, occurrence, convert)
            spans.append(TokenSpan(word, occurrence, ids))
        return spans

    def all_words(self) -> list[TokenSpan]:
        """Every token of the prompt as a word of its own, named by its characters; a space by "▁"."""
        seen: dict[str, int] = {}
        spans = []
        for index, (low, high) in self.offsets.items():
            name = self.text[low:high] or "▁"
            key = fold(name)
            spans.append(TokenSpan(name, seen.get(key, 0), (index,)))
            seen[key] = seen.get(key, 0) + 1
        return spans

    @cached_property
    def _folded(self) -> FoldedText:
        return FoldedText.of(self.text)

    def _ids_of(self, word: str, occurrence: int, convert: Callable[[str], str] | None) -> tuple[int, ...]:
        places = self._folded.places([convert(word)]) if convert else []
        places = places or self._folded.places([word])
        if not places and word.strip() in (BEGIN, END, self.begin_name, self.end_name):
            return (self._marker(word, occurrence),)
        places = places or self._folded.places(other_forms(fold(word).strip()))
        if not places:
            raise self._missing(word)
        if occurrence >= len(places):
            raise _too_high(word, occurrence, len(places))
        start, end = places[occurrence]
        ids = tuple(
            index
            for index, (low, high) in self.offsets.items()
            if low < min(end, high) and high > start  # a space between the words is none of them
        )
        if not ids:
            raise self._cut_off(word)
        return ids

    def _marker(self, word: str, occurrence: int) -> int:
        """Position of the begin or end token."""
        begins = word.strip() in (BEGIN, self.begin_name)
        # CLIP-like tokenizers may spell both alike; the generic names tell them apart.
        index = self.begin if begins else self.end
        if index is None:
            side = "begin token before" if begins else "end token after"
            raise ArgumentError(f"words: {word!r}: the text encoder has no {side} the prompt")
        if occurrence:
            raise _too_high(word, occurrence, 1)
        return index

    def _missing(self, word: str) -> ArgumentError:
        full = max(self.offsets, default=0) + 1 + (self.end is not None) >= self.length
        if self.prompt is not None and FoldedText.of(self.prompt).places([word]):
            if full:
                return self._cut_off(word)
            return ArgumentError(
                f"words: {word!r} is in the prompt, but the pipeline changed it: the text encoder is given "
                f"{self.text!r}"
            )
        words = {fold(self.text[low:high]): self.text[low:high] for low, high in words_in(self.text)}
        near = [repr(words[one]) for one in get_close_matches(fold(word), words)]
        return ArgumentError(
            f"words: {word!r} is not in the prompt; the words there: {', '.join(words.values())}"
            + (f"; nearest: {', '.join(near)}" if near else "")
        )

    def _cut_off(self, word: str) -> ArgumentError:
        return ArgumentError(
            f"words: {word!r} lies beyond the {self.length} tokens that the text encoder reads: shorten the prompt, "
            "or raise max_sequence_length if the pipeline has it"
        )


def checked_words(words: Any, source: str = "words") -> tuple[Word, ...]:
    """Returns words as a tuple.

    Args:
        words: words, phrases, or pairs of one and its occurrence; or spans, which say where the tokens of a word are.
        source: the argument's name, for the error.

    Raises:
        ArgumentError: for what is no list of words, or an empty one.
    """
    if isinstance(words, (str, bytes, Mapping)) or not isinstance(words, Iterable):
        raise ArgumentError(f"{source} must be a list of words, got {words!r}")
    words = tuple(words)
    if not words:
        raise ArgumentError(f"{source} must name at least one word, got none")
    for one in words:
        word_and_occurrence(one)
        places = one.ids if isinstance(one, TokenSpan) else (0,)
        if not places or not all(is_whole(index, 0) for index in places):
            raise ArgumentError(f"{source}: a TokenSpan must have places from 0, got {one!r}")
    return words


def check_prompt(prompt: Any) -> None:
    """Checks what is said about the prompt of a pipeline that is called with embeddings.

    Args:
        prompt: a text, one for each video, or `None`.

    Raises:
        ArgumentError: for anything else.
    """
    texts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
    if prompt is not None and (not texts or not all(isinstance(text, str) for text in texts)):
        raise ArgumentError(f"prompt must be a text, a list of one for each video, or None, got {prompt!r}")


def check_reach(token_ids: Any, length: int) -> None:
    """Checks that a denoiser is given the tokens whose maps are wanted: beyond them joint attention has the video's.

    Args:
        token_ids: a tensor on the host; elsewhere they are trusted, since a look at them would wait for the device.
        length: tokens of the text.

    Raises:
        ArgumentError: for a token beyond them: the pipeline was called with a `max_sequence_length` below the
            tokenizer's.
    """
    if token_ids.device.type == "cpu" and token_ids.numel() and int(token_ids.max()) >= length:
        raise ArgumentError(
            f"words: token {int(token_ids.max())} lies beyond the {length} tokens of text that the denoiser is given: "
            "shorten the prompt or raise max_sequence_length"
        )


def word_and_occurrence(given: Any) -> tuple[str, int]:
    """Returns a word and its occurrence.

    Args:
        given: a word, or a pair of it and its occurrence.

    Raises:
        ArgumentError: for anything else.
    """
    word: Any = None
    occurrence: Any = None
    if isinstance(given, str):
        word, occurrence = given, 0
    elif isinstance(given, TokenSpan):
        word, occurrence = given.word, given.occurrence
    elif isinstance(given, (tuple, list)) and len(given) == 2:
        word, occurrence = given
    try:
        number = -1 if isinstance(occurrence, bool) else operator.index(occurrence)
    except TypeError:
        number = None
    if number is None or not isinstance(word, str):
        raise ArgumentError(
            f"words must hold words or pairs (word, occurrence), such as 'cat' or ('cat', 1), got {given!r}"
        )
    if not fold(word).strip():
        raise ArgumentError(f"words must not hold an empty word, got {given!r}")
    if number < 0:
        raise ArgumentError(f"words: the occurrence of {word!r} must be 0 (the first) or more, got {occurrence!r}")
    return word, number


def _too_high(word: str, occurrence: int, count: int) -> ArgumentError:
    return ArgumentError(
        f"words: {word!r} occurs {count} time(s) in the prompt, so its occurrence must be 0 to {count - 1}, "
        f"got {occurrence}"
    )


def _text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer itself, of a processor of texts and images."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _shown(ids: Sequence) -> str:
    return repr(ids) if len(ids) < 8 else f"{ids[:8]!r}…"
