"""The programs of docs/notebooks run from top to bottom, and are cells that jupytext can read."""

from __future__ import annotations

import ast
import re
import runpy
import sys

import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.docs.pages import ROOT, anchors, links  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = ROOT / "docs" / "notebooks"
PROGRAMS = sorted(FOLDER.glob("*.py"))
#: What each must print, in this order, and the pictures it must leave.
TOLD = {
    "where_each_word_looks": (
        [
            r"Capture\(triangle, square: \d+ records of 1 run\(s\)\)",
            r"triangle: heat map \(8, (\d+), \1\)",
            r"step 0: \d+ layers, [1-9]\d*\.\d% of the attention\nstep 19:",
            r"Wan, cat: heat map \(3, 4, 4\) for 9 frames\nWan, dog:",
        ],
        ["shapes_words.png", "shapes_words.html", "wan_words.png"],
    ),
    "guide_a_video": (
        [
            r"unguided: Verdict\(.*all_right=False\)",
            r"guided: Verdict\(.*all_right=True\)\n2 of 20 steps",
            r"(?s)(step 0: loss .*){3}(step 1: loss .*){3}from",
            r"both: Verdict",
            r"as before: True",
        ],
        ["guided.png", "guided.gif", "loss.png", "both.png"],
    ),
    "kernels_in_your_processor": (
        [
            r"output \(1, 4, 256, 32\) maps \(1, 2, 256\) log-sum-exp \(1, 4, 256\)",
            r"output differs by (0e\+00|\de-0[6-9])\nmaps differ by (0e\+00|\de-0[6-9])",
            r"tokens \{'triangle': \d+, 'square': \d+\}",
            r"[1-9]\d* layers, \d+ maps; the clip differs by (0e\+00|\de-0[4-9])",
            r"capture's maps differ by (0e\+00|\de-0[5-9])",
        ],
        ["own_processor.png"],
    ),
    "train_a_classifier": (
        [
            r"labels: .*nowhere\n24 examples: maps \(24, 2, 2, \d+, 8, \d+, \d+\)",
            r"it moves \w+",
            r"right_prompt: right on \d+% of \d+ entities\nwrong_prompt",
            r"the one that ships: right on 7\d% ",
            r"[1-9] steps were guided by it",
        ],
        ["seen.png", "by_its_classifier.png"],
    ),
}


def name_of(program) -> str:
    return program.stem


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
@pytest.mark.filterwarnings("error::cvg_kernels.errors.GuidanceWarning")
def test_a_program_runs(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path / "new" / "pictures")])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(program), run_name="__main__")
    printed = capsys.readouterr().out
    expected, pictures = TOLD[program.stem]
    at = 0
    for one in expected:
        match = re.compile(one).search(printed, at)
        assert match, (one, printed[at:])
        at = match.end()
    assert {path.name for path in (tmp_path / "new" / "pictures").iterdir()} == set(pictures)
    for picture in (tmp_path / "new" / "pictures").glob("*.png"):
        with Image.open(picture) as image:
            assert len(set(image.convert("L").tobytes())) > 10
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_cells_are_well_formed(program):
    """Cells of text are comments alone, cells of code are whole statements, and the first is the title."""
    text = program.read_text(encoding="utf-8")
    begin, *cells = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    assert begin == ""
    kinds, bodies = cells[::2], cells[1::2]
    assert set(kinds) == {"", " [markdown]"} and kinds[0] == " [markdown]"
    assert re.match("# # .+\n", bodies[0])
    for kind, body in zip(kinds, bodies, strict=True):
        lines = body.strip().splitlines()
        assert lines
        if kind:
            assert all(line == "#" or line.startswith("# ") for line in lines), body
        else:
            assert ast.parse(body).body
    markdown = "\n".join(
        line.removeprefix("#").removeprefix(" ")
        for kind, body in zip(kinds, bodies, strict=True)
        if kind
        for line in body.splitlines()
    )
    for target in links(markdown):
        path, _, anchor = target.partition("#")
        there = program.parent / path
        assert there.exists() and (not anchor or anchor in anchors(there.read_text(encoding="utf-8"))), target


def test_the_page_lists_every_program():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert {target for target in links(page) if target.endswith(".py")} == {
        f"notebooks/{one.name}" for one in PROGRAMS
    }
    assert set(TOLD) == {one.stem for one in PROGRAMS}
