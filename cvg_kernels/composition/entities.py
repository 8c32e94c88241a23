"""What a prompt is about: its entities, and what it says of each.

An entity is a phrase of words, "red circle"; its label is what the classifier is asked about it, "left". The word that
names the label is withheld from the features, so that the maps are those of the thing and not of its description.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cvg_kernels.errors import ArgumentError
from cvg_kernels.prompts.tokens import TokenSpan, Word

_PARTS = re.compile(r"\s*(?:,|;|\.|\band\b|\bwhile\b)\s*", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:a|an|the|one)\s+", re.IGNORECASE)
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

    The prompt is cut at "and", "while" and punctuation; of each part the words between the article and a verb of
    motion are the entity, and the first label among the words behind them is its label.

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
    """
    entities = []
    start = 0
    for part in (part for part in _PARTS.split(prompt) if part.strip()):
        begin = prompt.index(part, start)
        start = begin + len(part)
        verb = _VERB.search(part)
        said = part[verb.end() :] if verb else ""
        phrase = _ARTICLE.sub("", (part[: verb.start()] if verb else part).strip())
        if not phrase:
            continue
        where = re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)", re.IGNORECASE)
        occurrence = len(where.findall(prompt[:begin]))
        words = (word.lower() for word in re.findall(r"\w+", said))
        label = next((word for word in words if word in labels), None)
        entities.append(Entity((phrase, occurrence), label))
    if not entities:
        raise ArgumentError(f"prompt must name something to look at, got {prompt!r}")
    return entities
