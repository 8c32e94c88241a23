"""Which tokens hold some characters of a prompt, worked out from the tokens' own letters alone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

#: A character, the marks on it, and the parts of a syllable of Hangul.
_CHARACTER = re.compile(r"\s+|\S[\u0300-\u036f\u1160-\u11ff\uff9e\uff9f]*", re.DOTALL)


def by_bytes(tokens: Sequence[str | None], letters: dict[str, int], prompt: str, place: tuple[int, int]) -> tuple:
    """Positions of the tokens of byte pairs, which are a prompt's in small letters, NFC, without white space.

    Args:
        tokens: as the vocabulary spells them, without those around the prompt, which are `None`; may be cut off.
        letters: letter → byte.
        prompt: what they are of.
        place: its first character and the one after the last.
    """
    pieces = [b"" if token is None else bytes(letters[one] for one in token.removesuffix("</w>")) for token in tokens]
    low, high, text = _folded(prompt, place, "NFC", "")
    low, high = len(text[:low].encode("utf-8")), len(text[:high].encode("utf-8"))
    assert text.encode("utf-8").startswith(b"".join(pieces))
    ends = [len(b"".join(pieces[: at + 1])) for at in range(len(pieces))]
    return tuple(
        at
        for at, (piece, end) in enumerate(zip(pieces, ends, strict=True))
        if end - len(piece) < high and end > low and piece
    )


def by_pieces(tokens: Sequence[str | None], prompt: str, place: tuple[int, int]) -> tuple:
    """Positions of the pieces of a sentencepiece model, which have all of a prompt, NFKC, "▁" for white space.

    Args:
        tokens: as the vocabulary spells them; `<unk>` is any characters, `<0xE7>` a byte, `None` none of the prompt's;
            a space alone is of no word.
        prompt: what they are of.
        place: its first character and the one after the last.
    """
    low, high, text = _folded(prompt, place, "NFKC", "▁")
    encoded, pattern = ("▁" + text).encode("utf-8"), b""
    low, high = (len(("▁" + text[:at]).encode("utf-8")) for at in (low, high))
    for token in tokens:
        if token == "<unk>":
            pattern += b"(.+?)"
        elif token is not None and re.fullmatch("<0x..>", token):
            pattern += b"(" + re.escape(bytes([int(token[3:5], 16)])) + b")"
        else:
            pattern += b"(" + re.escape((token or "").encode("utf-8")) + b")"
    found = re.fullmatch(pattern, encoded, re.DOTALL)
    return tuple(
        at
        for at, token in enumerate(tokens)
        if (token or "").strip("▁") and found.start(at + 1) < high and found.end(at + 1) > low
    )


def _folded(prompt: str, place: tuple[int, int], form: str, space: str) -> tuple[int, int, str]:
    """The prompt as the tokenizer reads it, and the first and last of its characters that a place has."""
    text, inside = "", []
    for match in _CHARACTER.finditer(prompt.strip()):
        shift = len(prompt) - len(prompt.lstrip())
        piece = unicodedata.normalize(form, match.group())
        piece = space if piece.isspace() else piece.lower() if form == "NFC" else piece
        if match.start() + shift < place[1] and match.end() + shift > place[0]:
            inside += [len(text), len(text) + len(piece)]
        text += piece
    return min(inside), max(inside), text
