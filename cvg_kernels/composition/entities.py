"""What a prompt is about: its entities, and what it says of each.

An entity is a phrase of words, "red circle"; its label is what the classifier is asked about it, "left". The word that
names the label is withheld from the features, so that the maps are those of the thing and not of its description.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cvg_kernels.errors import ArgumentError
from cvg_kernels.prompts.tokens import TokenSpan, Word

_PARTS = re.compile(r"\s*(?:,|;|\.|\band\b|\bwhile\b)\s*", re.IGNORECASE)
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER = re.compile(rf"({'|'.join((*_ARTICLES, *_NUMBERS))})\s+", re.IGNORECASE)
#: What may stand between two things and say how the first stands to the second.
_RELATIONS = ("left of", "right of", "above", "below", "behind", "in front of", "on top of", "under", "next to")
#: What ends the phrase of an entity: a verb of motion, with what may stand around it.
_VERB = re.compile(
    r"\b(?:is |are )?(?:moving|moves|move|going|goes|go|flying|flies|running|runs|sliding|slides)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Entity:
    """A thing of a prompt.

    Attributes:
        phrase: its words, and which of their occurrences.
        label: what the prompt says of it; `None`: nothing that is a label.
    """

    phrase: Word
    label: str | None

    @property
    def name(self) -> str:
        """The words."""
        if isinstance(self.phrase, TokenSpan):
            return self.phrase.word
        return self.phrase if isinstance(self.phrase, str) else self.phrase[0]


def entities_of(prompt: str, labels: Sequence[str]) -> list[Entity]:
    """Reads the entities of a prompt and their labels.

    The prompt is cut at "and", "while" and punctuation, and behind a relation that is a label ("left of"), which is
    the label of what stands before it. Of each part the words between the article or number and a verb of motion are
    the entity; its label is the first of: that relation, the first label among the words behind the verb, and the
    number in front. An article is the number "one".

    Args:
        prompt: e.g. "a red circle moving left and a blue square moving right".
        labels: the words that are labels.

    Raises:
        ArgumentError: if there is no entity.

    Examples:
        >>> from cvg_kernels.composition import entities_of
        >>> found = entities_of("a red circle moving left and a blue square moving right", ["left", "right"])
        >>> [(entity.name, entity.label) for entity in found]
        [('red circle', 'left'), ('blue square', 'right')]
        >>> found = entities_of("a red circle left of two blue squares", ["left of", "right of"])
        >>> [(entity.name, entity.label) for entity in found]
        [('red circle', 'left of'), ('blue squares', None)]
        >>> found = entities_of("a red circle and two blue squares", ["one", "two"])
        >>> [(entity.name, entity.label) for entity in found]
        [('red circle', 'one'), ('blue squares', 'two')]
    """
    entities = []
    start = 0
    for part, relation in _parts(prompt, labels):
        begin = prompt.index(part, start)
        start = begin + len(part)
        verb = _VERB.search(part)
        said = part[verb.end() :] if verb else ""
        number, phrase = _number_and_rest((part[: verb.start()] if verb else part).strip())
        if not phrase:
            continue
        where = re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)
        occurrence = len(where.findall(prompt[:begin]))
        words = (relation, *re.findall(r"\w+", said.lower()), number)
        label = next((word for word in words if word in labels), None)
        entities.append(Entity((phrase, occurrence), label))
    if not entities:
        raise ArgumentError(f"prompt must name something to look at, got {prompt!r}")
    return entities


def _parts(prompt: str, labels: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """What is said of one thing each, and the relation to the next that stands behind it, if that is a label."""
    relations = [relation for relation in _RELATIONS if relation in labels]
    between = re.compile(rf"\s+({'|'.join(relations)})\s+(?=\w)", re.IGNORECASE) if relations else None
    for part in filter(str.strip, _PARTS.split(prompt)):
        *pairs, last = between.split(part) if between else [part]
        for said, relation in zip(pairs[::2], pairs[1::2], strict=True):
            yield said, relation.lower()
        yield last, None


def _number_and_rest(text: str) -> tuple[str | None, str]:
    """The number that a phrase begins with, "one" for an article, and the rest."""
    found = _NUMBER.match(text)
    if found is None:
        return None, text
    word = found[1].lower()
    return ("one" if word in _ARTICLES else word), text[found.end() :]
