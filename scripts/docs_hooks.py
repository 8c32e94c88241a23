"""What the docs site does with pages that lie elsewhere in the repository; mkdocs.yml names this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Shows CHANGELOG.md, whose links start at the top of the repository, as the page changelog.md."""
    if page.file.src_uri != "changelog.md":
        return markdown
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
