"""Other forms of a word in which a prompt may have it: the plural of a singular and the other way round."""

from __future__ import annotations

from collections.abc import Iterator

#: Singular and plural; they hold at the end of longer words too ("woman", "grandchild").
_IRREGULAR = (
    ("man", "men"),
    ("child", "children"),
    ("foot", "feet"),
    ("tooth", "teeth"),
    ("goose", "geese"),
    ("mouse", "mice"),
    ("louse", "lice"),
    ("person", "people"),
    ("ox", "oxen"),
    ("die", "dice"),
    ("quiz", "quizzes"),
    ("cactus", "cacti"),
    ("fungus", "fungi"),
    ("octopus", "octopi"),
    ("nucleus", "nuclei"),
    ("axis", "axes"),
    ("crisis", "crises"),
    ("oasis", "oases"),
    ("phenomenon", "phenomena"),
    ("matrix", "matrices"),
    ("vertex", "vertices"),
    ("chateau", "chateaux"),
    ("plateau", "plateaux"),
    *(
        (stem + "f", stem + "ves")
        for stem in ("wol", "lea", "shel", "hal", "cal", "loa", "thie", "scar", "hoo", "shea", "dwar", "el", "sel")
    ),
    *((stem + "fe", stem + "ves") for stem in ("kni", "li", "wi")),
)

#: Words that an "s" more or less turns into another word altogether.
_OTHER_WORDS = frozenset(
    "news new his has hi was does this thi its yes pants pant clothes clothe goods good "  # noqa: SIM905
    "customs custom arms physics ethics species series always perhaps across blues thus plus".split()
)

#: Plurals that mean another thing without their ending: "glass" finds "two glasses", "glasses" does not find "a
#: glass".
_NO_SINGULAR = frozenset(("glasses",))

#: Korean writes particles onto the noun.
_PARTICLES = tuple(
    "은 는 이 가 을 를 와 과 의 에 도 만 로 으로 에서 에게 께서 하고 이랑 랑 처럼 보다 까지 부터 "  # noqa: SIM905
    "들 들이 들은 들을 들과 들의".split()
)


def other_forms(phrase: str) -> list[str]:
    """Spellings under which a word or phrase may stand in a prompt that does not have it as it is.

    "boat" gives "boats", "wolves" gives "wolf", "red boat" gives "red boats", Korean "개" gives "개가". Some are no
    words; no prompt has them, so they do no harm.

    Args:
        phrase: folded (`matching.fold`), in any language; one word of it is changed, the last ones first.
    """
    words = phrase.split()
    return [
        " ".join([*words[:index], form, *words[index + 1 :]])
        for index in reversed(range(len(words)))
        for form in dict.fromkeys(_forms(words[index]))
        if form not in _OTHER_WORDS
    ]


def _forms(word: str) -> Iterator[str]:
    if "가" <= word[-1] <= "힣":
        yield from (word + particle for particle in _PARTICLES)
    if len(word) < 2 or not ("a" <= word[-1] <= "z" or word[-1] == "é") or word in _OTHER_WORDS:
        return
    for singular, plural in _IRREGULAR:
        if word.endswith(singular):
            yield word.removesuffix(singular) + plural
        if word.endswith(plural):
            yield word.removesuffix(plural) + singular
    if len(word) > 2:
        yield from _plurals(word)
        if word not in _NO_SINGULAR:
            yield from _singulars(word)


def _plurals(word: str) -> Iterator[str]:
    yield word + "s"
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        yield word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        yield word[:-1] + "ies"


def _singulars(word: str) -> Iterator[str]:
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        yield word[:-1]
    if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        yield word[:-2]
    if word.endswith("ies") and len(word) > 4:
        yield word[:-3] + "y"
