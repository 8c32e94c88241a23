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
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


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
        for start, end in _clusters(text):
            piece = text[start:end]
            piece = " " if piece.isspace() else fold(piece)
            folded.append(piece)
            spans += [(start, end)] * len(piece)
            first += [at == 0 for at in range(len(piece))]
            last += [at == len(piece) - 1 for at in range(len(piece))]
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
        found, at = [], 0
        while match := search.search(self.text, at):
            start, end = match.span()
            if self._stands_alone(start, end):
                found.append((self.spans[start][0], self.spans[end - 1][1]))
                at = end
            else:
                at = start + 1
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
    visible = "".join(one for one in text if not _invisible(one))
    composed = unicodedata.normalize("NFKC", visible.translate(_LOOKALIKES))
    folded = unicodedata.normalize("NFKC", composed.translate(_DOTTED).casefold())
    return " ".join(re.split(r"\s+", folded.replace("i\u0307", "i")))


def words_in(text: str) -> list[tuple[int, int]]:
    """Characters of each word: letters, digits and marks, with apostrophes and hyphens inside ("cat's", "T-shirt")."""
    mask = "".join("w" if word_character(one) else "j" if one.translate(_LOOKALIKES) in "'-" else " " for one in text)
    return [match.span() for match in re.finditer("w+(?:jw+)*", mask)]


def _joined(outside: str, edge: str) -> bool:
    """Whether a character next to a word would be read as part of it."""
    return word_character(outside) and not unspaced(outside) and not unspaced(edge)


def _invisible(character: str) -> bool:
    """Soft hyphens, joiners, marks of direction, and selectors between forms of one character."""
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def _clusters(text: str) -> Iterable[tuple[int, int]]:
    """Splits a text into characters with the marks on them, and runs of white space."""
    start = 0
    for at in range(1, len(text) + 1):
        if at < len(text) and _continues(text[at - 1], text[at]):
            continue
        yield start, at
        start = at


def _continues(before: str, character: str) -> bool:
    if character.isspace():
        return before.isspace()
    if before.isspace():
        return False
    return (
        unicodedata.category(character).startswith("M")
        or "\u1160" <= character <= "\u11ff"  # vowels and finals of decomposed Hangul
        or character in "\uff9e\uff9f"  # voice marks of half-width Katakana
    )


def _pattern(word: str) -> str:
    """Regular expression of a folded word: a space may stand next to any character that is no letter.

    Text that was put together again from tokens has such spaces: "t - shirt", "cat 's", "4 k".
    """
    made, gap = "", ""
    for at, character in enumerate(word):
        if character == " ":
            continue
        if at:
            spaced = word[at - 1] == " "
            before = word[at - 2] if spaced else word[at - 1]
            letters = _letter(before) and _letter(character)
            gap = (" " if spaced else "") if letters else " ?"
        made += gap + re.escape(character)
    return made


def _letter(character: str) -> bool:
    return word_character(character) and not character.isdigit() and character != "_"
