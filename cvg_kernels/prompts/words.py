"""Which words a prompt is about."""

from __future__ import annotations

import re

from cvg_kernels.errors import ArgumentError
from cvg_kernels.prompts import lexicon
from cvg_kernels.prompts.matching import FoldedText, fold, unspaced, words_in
from cvg_kernels.prompts.parts_of_speech import Tagger, tag
from cvg_kernels.prompts.tokens import Word

#: What is written onto the end of a word: "cat's", "they're".
_CLITIC = re.compile(r"['’](?:s|re|ve|ll|d|m)$", re.IGNORECASE)


def content_words(prompt: str) -> list[Word]:
    """The words a prompt is about, each with its occurrence: all but function words and words of motion.

    Left out as well: numbers, single letters, and what is said of the picture's quality ("4k", "masterpiece"). "cat's"
    counts as "cat", "T-shirt" is one word.

    Args:
        prompt: English, or another language that is written with spaces (whose function words stay).

    Raises:
        ArgumentError: if none is left, or for Chinese, Japanese, Thai and others written without spaces.
    """
    return _chosen(prompt, [place for place in _words(prompt) if _content(_word(prompt, place))])


def nouns_and_verbs(prompt: str, tagger: Tagger = "auto") -> list[Word]:
    """The nouns and verbs of a prompt, each with its occurrence, as Vico's paper chooses its words.

    Words of motion are among them, numbers and what is said of the picture's quality are not.

    Args:
        prompt: English.
        tagger: see `parts_of_speech.tag`; `"rules"` gives the same words everywhere.

    Raises:
        ArgumentError: if there is none, for another tagger, or for a language written without spaces.
        BackendUnavailableError: for a tagger that is asked for by name and is not there.
    """
    _words(prompt)
    places = [
        _without_clitic(prompt, place)
        for place, part in tag(prompt, tagger)
        if part != "other" and not _empty(_word(prompt, _without_clitic(prompt, place)))
    ]
    return _chosen(prompt, places)


def _words(prompt: str) -> list[tuple[int, int]]:
    """Characters of each word, what is written onto its end left out."""
    places = words_in(prompt)
    for start, end in places:
        if any(unspaced(one) for one in prompt[start:end]):
            raise ArgumentError(
                f"words must be given: {prompt[start:end]!r} in the prompt is written without spaces, so its words "
                "cannot be told apart; name them, such as words=['猫', '狗']"
            )
    return [_without_clitic(prompt, place) for place in places]


def _without_clitic(prompt: str, place: tuple[int, int]) -> tuple[int, int]:
    start, end = place
    return start, end - len(prompt[start:end]) + len(_CLITIC.sub("", prompt[start:end]))


def _word(prompt: str, place: tuple[int, int]) -> str:
    return fold(prompt[slice(*place)])


def _content(word: str) -> bool:
    return not (_empty(word) or word in lexicon.FUNCTION_WORDS or word in lexicon.MOTION)


def _empty(word: str) -> bool:
    """Whether a word shows nothing by itself: a letter, a number, a mark of quality."""
    number = word.replace("-", "").replace("_", "").isdigit()
    letter = len(word) == 1 and word < "\u1100"  # a syllable of Hangul may be a word
    return letter or number or word in lexicon.QUALITY


def _chosen(prompt: str, places: list[tuple[int, int]]) -> list[Word]:
    """Words with the number that `EncodedText.find` counts them by: "cat" is also found in "cat-like"."""
    if not places:
        raise ArgumentError(f"words must be given: the prompt {prompt!r} has no content word")
    folded = FoldedText.of(prompt)
    return [(word, folded.places([word]).index(place)) for place in places for word in [prompt[slice(*place)]]]
