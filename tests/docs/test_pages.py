"""The pages of the documentation: links that lead somewhere, snippets that are Python, messages that exist."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import cvg_kernels
from tests.docs.pages import PAGES, ROOT, anchors, blocks, links

PACKAGE = ROOT / "cvg_kernels"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for target in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        if not there.exists() or (anchor and anchor not in anchors(there.read_text("utf-8"))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_are_python_and_name_what_exists(page):
    for snippet in blocks(page.read_text(encoding="utf-8"), "python"):
        named = {
            node.attr
            for node in ast.walk(ast.parse(snippet))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cvg"
        }
        assert named <= set(cvg_kernels.__all__)


def test_the_snippets_about_kernels_run_one_after_the_other():
    """And what they say of shapes is so."""
    names: dict[str, object] = {}
    for snippet in blocks((ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"), "python"):
        exec(snippet, names)
    sizes = {name: getattr(names[name], "shape", None) for name in ("maps", "lse", "peaks", "flow", "side", "cross")}
    assert sizes == {
        "maps": (1, 60, 4, 4),
        "lse": (1, 8, 240),
        "peaks": (1, 2),
        "flow": (3,),
        "side": (3, 6),
        "cross": (1, 2, 4, 60),
    }


def test_the_site_has_every_page_and_every_picture_is_shown():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", nav, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.name for page in PAGES if page.parent.name == "docs"}
    shown = {Path(target).name for page in PAGES for target in links(page.read_text("utf-8"))}
    assert {picture.name for picture in (ROOT / "docs").glob("*.png")} - shown == set()


def texts_of_the_package() -> list[str]:
    """Every string of the package, an f-string with `…` for what it fills in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
    return found


@pytest.mark.drawn(8, of="long tests")
def test_the_messages_of_troubleshooting_exist():
    """Piece by piece: where a message on the page has `…`, the code fills something in."""
    texts = texts_of_the_package()
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [line for body in blocks(page, "text") for line in body.splitlines()]
    assert len(messages) > 30
    strange = [
        piece
        for message in messages
        for piece in re.split("…|, got", message)
        if len(piece.strip()) > 3 and not any(piece.strip() in text for text in texts)
    ]
    assert not strange


def test_the_readme_is_a_front_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("method", ["cvg", "vico", "vstar", "gen1"])
def test_the_readme_counts_the_pipelines_of_the_methods(method):
    rows = json.loads((ROOT / "docs" / "coverage.json").read_text(encoding="utf-8"))["rows"]
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in table.splitlines() if line.lower().replace("-", "").startswith(f"| {method} "))
    count = sum(row[method] == "yes" for row in rows.values())
    assert str(count) in re.findall(r"\d+", line.split("|")[3])
