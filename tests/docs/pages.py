"""The pages of the documentation as text: what they link to, show and quote."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Markdown that people read: the top of the repository, and the pages of the site.
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [body for name, body in _FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    """A page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def links(text: str) -> list[str]:
    """Targets of links and pictures."""
    return _LINK.findall(prose(text))


def anchors(text: str) -> set[str]:
    """What a link may name behind `#`: the headings, as GitHub and the site spell them."""
    heads = re.findall(r"^#+ +(.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def entries() -> dict[str, str]:
    """What docs/api.md has: where an entry is defined → the name that the page gives it."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: (\S+)\n    options:\n      heading: (\S+)$", page, re.MULTILINE)
    assert len(found) == len(re.findall("^:::", page, re.MULTILINE))
    assert len(dict(found)) == len(found)
    return dict(found)
