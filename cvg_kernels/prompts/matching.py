"""Where a word stands in a text: spelling variants, word boundaries and scripts written without spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

#: Characters that people exchange for one another.
_LOOKALIKES = str.maketrans(
    {**dict.fromkeys("‘’‚‛ʼʹ`´′＇", "'"), **dict.fromkeys("“”„‟«»″＂", '"'), **dict.fromkeys("‐‑‒–—―−﹣－", "-")}
)
#: As Python's own case-insensitive search has it: the Turkish letters i with and without a dot are "i".
_DOTTED = str.maketrans({"İ": "i", "ı": "i"})

#: Scripts written without spaces between words: Chinese, Japanese, Thai, Lao, Tibetan, Burmese, Khmer and their kin.
_UNSPACED = (
    (0x0E00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x1950, 0x19FF),
    (0x1A20, 0x1AAF),
    (0x1B00, 0x1B7F),
    (0x2E80, 0x2FDF),
    (0x3005, 0x3007),
    (0x3021, 0x312F),
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA980, 0xA9DF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
    (0x16FE0, 0x18DFF),
    (0x1AFF0, 0x1B2FF),
    (0x20000, 0x3FFFF),
)


def unspaced(character: str) -> bool:
    """Says whether a character belongs to a script that is written without spaces between words."""
    code = ord(character)
    return code >= 0x0E00 and any(low <= code <= high for low, high in _UNSPACED)


def word_character(character: str) -> bool:
    """Says whether a character is part of a word: a letter, a digit, an underscore or a mark on one of them."""
    return character.isalnum() or character == "_" or _mark(character)


def depends(text: str) -> bool:
    """Says whether a text stands for nothing by itself: marks that are on a letter before it, and what is not seen."""
    return bool(text) and all(_mark(one) or _invisible(one) for one in text)


@dataclass(frozen=True)
class FoldedText:
    """A text as it is compared, and which characters of the text each of its characters stands for.

    Compared without case, accents composed (NFKC), with one kind of quotation mark and hyphen, every run of white
    space as one space, and without invisible characters.

    Attributes:
        text: the folded text.
        spans: per character of it, the first and the one after the last character of the original.
        first: whether it is the first that its original was folded to ("ß" is folded to two).
        last: whether it is the last.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    first: tuple[bool, ...]
    last: tuple[bool, ...]

    @classmethod
    def of(cls, text: str) -> FoldedText:
        """Folds a text."""
        folded, spans, first, last = [], [], [], []
        text = _with_spaces(text)
        for start, end in _clusters(text):
            piece = " " if text[start].isspace() else _fold(text[start:end])
            folded.append(piece)
            spans += [(start, end)] * len(piece)
            first += [index == 0 for index in range(len(piece))]
            last += [index == len(piece) - 1 for index in range(len(piece))]
        return cls("".join(folded), tuple(spans), tuple(first), tuple(last))

    def places(self, words: Iterable[str]) -> list[tuple[int, int]]:
        """Characters of the original where one of some words or phrases stands, in the order of the text.

        Args:
            words: alternatives, in any spelling that folds to the text's.
        """
        patterns = [pattern for word in words if (pattern := _pattern(fold(word).strip()))]
        if not patterns:
            return []
        search = re.compile("|".join(sorted(patterns, key=len, reverse=True)))
        found, index = [], 0
        while match := search.search(self.text, index):
            start, end = match.span()
            if self._stands_alone(start, end):
                found.append((self.spans[start][0], self.spans[end - 1][1]))
                index = end
            else:
                index = start + 1
        return found

    def _stands_alone(self, start: int, end: int) -> bool:
        """Whether characters are whole words: letters next to them are of a script without spaces, on either side."""
        if not (self.first[start] and self.last[end - 1]):
            return False
        before = start > 0 and _joined(self.text[start - 1], self.text[start])
        after = end < len(self.text) and _joined(self.text[end], self.text[end - 1])
        return not (before or after)


def fold(text: str) -> str:
    """The form of a text that is compared: see `FoldedText`."""
    return _fold(_with_spaces(text))


def _fold(text: str) -> str:
    visible = "".join(one for one in text if not _invisible(one))
    composed = unicodedata.normalize("NFKC", visible.translate(_LOOKALIKES))
    folded = unicodedata.normalize("NFKC", composed.translate(_DOTTED).casefold())
    return " ".join(re.split(r"\s+", folded.replace("i\u0307", "i")))


def words_in(text: str) -> list[tuple[int, int]]:
    """Characters of each word: letters, digits and marks, and apostrophes, hyphens ("T-shirt") and what cannot be seen
    inside.
    """
    mask = "".join(map(_kind, _with_spaces(text)))
    return [match.span() for match in re.finditer("w+(?:i*(?:ji*)?w+)*", mask)]


def _kind(character: str) -> str:
    """What a character does in a word: w, it is of it; j, it joins two parts of it; i, it is not seen."""
    if word_character(character):
        return "w"
    if character.translate(_LOOKALIKES) in "'-":
        return "j"
    return "i" if _invisible(character) else " "


def _joined(outside: str, edge: str) -> bool:
    """Whether a character next to a word would be read as part of it; next to a sign or an emoji, none is."""
    return all(word_character(one) and not unspaced(one) for one in (outside, edge))


def _invisible(character: str) -> bool:
    """Soft hyphens, joiners, marks of direction, and selectors between forms of one character."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def _with_spaces(text: str) -> str:
    """The text with a space for every zero-width one, but between letters of a script without spaces: a line may end
    there.
    """

    def space(match: re.Match) -> str:
        neighbours = text[max(0, match.start() - 1) : match.start()] + text[match.end() : match.end() + 1]
        return match.group() if any(map(unspaced, neighbours)) else " " * len(match.group())

    return re.sub("\u200b+", space, text)


def _clusters(text: str) -> Iterable[tuple[int, int]]:
    """Splits a text into characters with the marks on them, and runs of white space with what is not seen in them."""
    start = 0
    for index in range(1, len(text) + 1):
        if index < len(text) and _continues(text[start], text[index]):
            continue
        yield start, index
        start = index


def _continues(first: str, character: str) -> bool:
    """Whether a character belongs to those before it, of which the first is given."""
    if first.isspace():
        return character.isspace() or unicodedata.category(character) == "Cf"
    return (
        _mark(character)
        or "\u1160" <= character <= "\u11ff"  # vowels and finals of decomposed Hangul
        or character in "\uff9e\uff9f"  # voice marks of half-width Katakana
    )


def _pattern(word: str) -> str:
    """Regular expression of a folded word: a space may stand next to any character that is no letter.

    Text that was put together again from tokens has such spaces: "t - shirt", "cat 's", "4 k", and on either side of
    marks that are no part of a letter, as in Hindi; nothing else has one before a mark.
    """
    pattern, last, spaced, index = "", None, False, 0
    while index < len(word):
        end = index + 1
        while _mark(word[index]) and end < len(word) and _mark(word[end]):
            end += 1
        piece, inside = re.escape(word[index:end]), " ?" if word[end : end + 1].strip() else ""
        if word[index] == " ":
            spaced, index = True, end
            continue
        if _mark(word[index]) and last and not spaced:
            pattern += f"(?: {piece}{inside}|{piece})"
        else:
            if last:
                letters = _letter(last) and _letter(word[index])
                pattern += (" " if spaced else "") if letters else " ?"
            pattern += piece
            if piece == "i":
                pattern += f"(?: \u0307{inside})?"  # what is left of "İ"
        last, spaced, index = word[end - 1], False, end
    return pattern


def _mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _letter(character: str) -> bool:
    return word_character(character) and not character.isdigit() and character != "_"
