"""What a tokenizer makes of a text: the tokens of the text itself and the characters that each stands for."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from cvg_kernels.prompts.matching import FoldedText, depends

Span = tuple[int, int]

#: How tokenizers print a space that is a token of its own.
_SPACES = "▁Ġ \n\t"
_UNKNOWN = "\ufffd"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_EVERYTHING = 1 << 20


@dataclass(frozen=True)
class Encoding:
    """The ids of a text and what each of them is.

    Attributes:
        ids: as the tokenizer gives them.
        text: the text.
        offsets: position of each token of the text itself → its characters, without white space at their ends.
        begin: position of the token before them that marks the beginning, if there is one.
        end: position of the token after them that marks the end.
    """

    ids: tuple[int, ...]
    text: str
    offsets: dict[int, Span]
    begin: int | None
    end: int | None


@dataclass(frozen=True)
class Template:
    """The tokens that a text encoder is given around every prompt, padding aside."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def inside(self, tokenizer: Any, ids: Sequence[int]) -> tuple[int, int]:
        """The first of a prompt's own ids, and the one after the last.

        Args:
            tokenizer: that made them.
            ids: in the template, which may be cut off at the end, and padded.
        """
        start, kept = without_padding(tokenizer, ids)
        pairs = enumerate(zip(kept, self.before, strict=False))
        begun = next((index for index, (a, b) in pairs if a != b), min(len(kept), len(self.before)))
        own = kept[begun:]
        ends = (n for n in range(len(self.after), 0, -1) if own[-n:] == self.after[:n])
        return start + begun, start + len(kept) - next(ends, 0)


def without_padding(tokenizer: Any, ids: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """How many ids are padding before a text, and the ids without the padding on either side.

    Args:
        tokenizer: that made them.
        ids: ids of one text.
    """
    pad, first, last = tokenizer.pad_token_id, 0, len(ids)
    if pad is None:
        return 0, tuple(ids)
    while last and ids[last - 1] == pad:
        last -= 1
    while first < last and ids[first] == pad != tokenizer.bos_token_id:
        first += 1
    return first, tuple(ids[first:last])


def standing(tokenizer: Any, prompt: str, ids: Sequence[int]) -> tuple[int, int] | None:
    """The first and the one after the last of the ids that are a prompt's, where they stand together; the last such
    place.

    Args:
        tokenizer: that made them.
        prompt: to look for; in a template, its first token may be another, and then it is not found.
        ids: ids of a text that holds it.
    """
    own = list(tokenizer(prompt, add_special_tokens=False).input_ids)
    starts = range(len(ids) - len(own), -1, -1)
    start = next((index for index in starts if own and list(ids[index : index + len(own)]) == own), None)
    return None if start is None else (start, start + len(own))


def encode(tokenizer: Any, text: str, max_length: int | None = None) -> Encoding:
    """Tokenises a text.

    Args:
        tokenizer: fast or slow.
        text: any.
        max_length: tokens kept; by default as many as the tokenizer says.
    """
    length = max_length or longest(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        return _encode_without_offsets(tokenizer, text, length)
    encoded = tokenizer(
        text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=True, max_length=length
    )
    ids, special = tuple(encoded.input_ids), encoded.special_tokens_mask
    offsets = {index: span for index, span in enumerate(encoded.offset_mapping) if not special[index]}
    offsets = _without_spaces(tokenizer, ids, text, _bytes_apart(tokenizer, ids, text, offsets))
    first = next(iter(offsets), None)
    if first is None:
        begin, _, _, end = own_tokens(tokenizer, ids)
    else:
        after = next(reversed(offsets)) + 1
        begin = first - 1 if first else None
        end = after if after < len(ids) else None
    return Encoding(ids, text, offsets, begin, end)


def decode(tokenizer: Any, ids: Sequence[int], inside: tuple[int, int] | None = None) -> Encoding:
    """Puts a text together again from ids that a text encoder was given, padding and all.

    Args:
        tokenizer: that made them.
        ids: with or without begin, end and padding.
        inside: the first of the text's own ids and the one after the last, where they stand in a template.
    """
    begin, first, last, end = own_tokens(tokenizer, ids)
    if inside is not None:
        first, last = inside
    text, offsets = _rebuild(tokenizer, ids, first, last)
    return Encoding(tuple(ids), text, _without_spaces(tokenizer, ids, text, offsets), begin, end)


def longest(tokenizer: Any) -> int:
    """The longest sequence the tokenizer makes; some state none, as a huge number."""
    return min(tokenizer.model_max_length, _EVERYTHING)


def markers(tokenizer: Any) -> tuple[int | None, int | None]:
    """Ids of the tokens that the tokenizer puts before and after every text."""
    ids = tokenizer("").input_ids
    if not ids:
        return None, None
    if len(ids) == 1:
        begins = ids[0] in (tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None))
        ends = ids[0] in (tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None))
        return (ids[0], None) if begins and not ends else (None, ids[0])
    return ids[0], ids[-1]


def own_tokens(tokenizer: Any, ids: Sequence[int]) -> tuple[int | None, int, int, int | None]:
    """Which ids are those of the text itself: position of the begin token, first, after the last, of the end token."""
    pad = tokenizer.pad_token_id
    begin_id, end_id = markers(tokenizer)
    first, last = 0, len(ids)
    while last > first and pad is not None and ids[last - 1] == pad:
        last -= 1
    while first < last and ids[first] == pad and pad != begin_id:
        first += 1
    begin = end = None
    if begin_id is not None and first < last and ids[first] == begin_id:
        begin, first = first, first + 1
    if end_id is not None and end_id == pad and last < len(ids):  # CLIP pads with its end token
        end = last
    elif end_id is not None and first < last and ids[last - 1] == end_id:
        end = last = last - 1
    return begin, first, last, end


def _encode_without_offsets(tokenizer: Any, text: str, length: int) -> Encoding:
    """Encodes with a tokenizer that gives no offsets: its tokens are read back and laid against the text."""
    ids = tuple(tokenizer(text, truncation=True, max_length=length).input_ids)
    begin, first, last, end = own_tokens(tokenizer, ids)
    # All of the text, so that what was cut off is not taken for what was kept.
    whole = tuple(tokenizer(text, truncation=True, max_length=_EVERYTHING).input_ids)
    _, all_first, all_last, _ = own_tokens(tokenizer, whole)
    rebuilt, offsets = _rebuild(tokenizer, whole, all_first, all_last, unknown=_UNKNOWN)
    offsets = _laid_against(text, rebuilt, offsets)
    shift = first - all_first
    kept = {index + shift: span for index, span in offsets.items() if index + shift < last}
    return Encoding(ids, text, _without_spaces(tokenizer, ids, text, kept), begin, end)


def _rebuild(
    tokenizer: Any, ids: Sequence[int], first: int, last: int, unknown: str | None = None
) -> tuple[str, dict[int, Span]]:
    """Text of some ids and the characters of each token.

    Tokens that were added to the vocabulary (textual inversion) stand between spaces; decoders glue them to their
    neighbours. Special tokens (of a chat template) are left out; an unknown one is of the text.

    Args:
        tokenizer: theirs.
        ids: all.
        first: first of the text's own tokens.
        last: after the last of them.
        unknown: what stands for a token that stands for nothing known; its own name by default.
    """
    added = set(getattr(tokenizer, "get_added_vocab", dict)().values())
    unknown_id = tokenizer.unk_token_id
    special = set(tokenizer.all_special_ids) - {unknown_id}
    text, offsets, index = "", {}, first
    while index < last:
        if text and not text.endswith(" "):
            text += " "
        if ids[index] in special:
            index += 1
        elif ids[index] in added or ids[index] == unknown_id:
            name = tokenizer.convert_ids_to_tokens(ids[index])
            name = unknown if unknown and ids[index] == unknown_id else name
            offsets[index] = (len(text), len(text) + len(name))
            text, index = text + name, index + 1
        else:
            after = index
            while after < last and ids[after] not in special | added | {unknown_id}:
                after += 1
            piece, spans = _decode_run(tokenizer, ids[index:after])
            for place, (low, high) in enumerate(spans, index):
                offsets[place] = (len(text) + low, len(text) + high)
            text, index = text + piece, after
    return text, offsets


def _decode_run(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """Text of ordinary tokens and the characters of each, from growing prefixes.

    A prefix may end inside a character of several bytes, where it leaves the whole text: that character is of the
    token that begins it and of all that go on with it.
    """
    whole = _text_of(tokenizer, ids)
    spans, waiting, done = [], 0, 0
    for count in range(1, len(ids) + 1):
        settled, begun = len(whole), 0
        if count < len(ids):
            prefix = _text_of(tokenizer, ids[:count])
            settled = _common_prefix(prefix, whole)
            begun = int(settled < len(prefix) and settled < len(whole))
        waiting += 1
        if settled + begun > done or count == len(ids):
            spans += [(done, max(settled + begun, done))] * waiting
            waiting, done = 0, max(settled, done)
    return whole, spans


def _text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _common_prefix(a: str, b: str) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _bytes_apart(tokenizer: Any, ids: Sequence[int], text: str, offsets: dict[int, Span]) -> dict[int, Span]:
    """Offsets with the character of each token that is a byte (`<0xE7>`): tokenizers give all such tokens in a row the
    characters of all of them.
    """
    names = {index: tokenizer.convert_ids_to_tokens(ids[index]) for index in offsets}
    apart = dict(offsets)
    for (low, high), row in groupby((index for index in offsets if _BYTE.fullmatch(names[index])), key=offsets.get):
        row = list(row)
        raw = bytes(int(names[index][3:5], 16) for index in row)
        begun = [len(raw[:count].decode("utf-8", "ignore")) for count in range(len(raw))]
        found = {index: (first, first + 1) for index, first in zip(row, begun, strict=True)}
        found = _laid_against(text[low:high], raw.decode("utf-8", "replace"), found)
        apart |= {index: (low + first, low + last) for index, (first, last) in found.items()}
    return apart


def _laid_against(text: str, rebuilt: str, offsets: dict[int, Span]) -> dict[int, Span]:
    """Offsets in a text from those in what was rebuilt from its tokens: spaces, case and unknown words may differ."""
    ours, theirs = FoldedText.of(text), FoldedText.of(rebuilt)
    place: list[Span] = []  # per folded character of the rebuilt text
    blocks = SequenceMatcher(None, theirs.text, ours.text, autojunk=False).get_opcodes()
    for kind, low, high, start, end in blocks:
        if kind == "equal":
            place += ours.spans[start:end]
        else:
            span = (ours.spans[start][0], ours.spans[end - 1][1]) if end > start else (0, 0)
            place += [span] * (high - low)
    begins, ends = ([span[side] for span in theirs.spans] for side in (0, 1))
    found: dict[int, Span] = {}
    for index, (low, high) in offsets.items():
        inside = place[bisect_right(ends, low) : bisect_left(begins, high)]
        spans = [span for span in inside if span[1] > span[0]]
        found[index] = (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else (0, 0)
    known = {index: span for index, span in found.items() if span[1]}
    for index, (low, high) in offsets.items():
        piece = rebuilt[low:high].strip()
        if index in known or not (depends(piece) or piece == _UNKNOWN):
            continue
        start = max((end for other, (_, end) in known.items() if other < index), default=0)
        end = min((begin for other, (begin, _) in known.items() if other > index), default=len(text))
        if start < end:
            found[index] = (start, end)
        elif piece != _UNKNOWN:  # a mark on a letter that is compared without it
            found[index] = (max(0, start - 1), start)
    return found


def _without_spaces(tokenizer: Any, ids: Sequence[int], text: str, offsets: dict[int, Span]) -> dict[int, Span]:
    """Offsets without white space at their ends; a token that is but a space has no characters."""
    trimmed = {}
    for index, (low, high) in offsets.items():
        piece = tokenizer.convert_ids_to_tokens(ids[index])
        while low < high and text[high - 1].isspace():
            high -= 1
        while low < high and text[low].isspace():
            low += 1
        trimmed[index] = (low, high) if piece.strip(_SPACES) else (high, high)
    return trimmed


def shifted(encoding: Encoding, ids: Sequence[int], tokenizer: Any) -> Encoding | None:
    """The encoding placed in a longer sequence that is the same but for padding; `None` if it is another.

    Args:
        encoding: encoding of a text.
        ids: what a text encoder was given.
        tokenizer: theirs.
    """
    size = len(encoding.ids)
    for by in {0, len(ids) - size}:
        if by < 0 or tuple(ids[by : by + size]) != encoding.ids:
            continue
        if {*ids[:by], *ids[by + size :]} <= {tokenizer.pad_token_id}:
            return replace(
                encoding,
                ids=tuple(ids),
                offsets={index + by: span for index, span in encoding.offsets.items()},
                begin=None if encoding.begin is None else encoding.begin + by,
                end=None if encoding.end is None else encoding.end + by,
            )
    return None
