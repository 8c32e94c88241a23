"""The table of coverage is whole: a row for every case, a reason for every refusal, no pipeline of diffusers
forgotten.
"""

from __future__ import annotations

import importlib
import inspect

import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.coverage import table  # noqa: E402
from tests.coverage.facts import LEFT_OUT, WITHOUT_MAPS  # noqa: E402
from tests.pipelines import PIPELINES  # noqa: E402


@pytest.fixture(scope="module")
def committed():
    return table.read()


def video_pipelines() -> set[str]:
    """Pipelines of diffusers that speak of frames, those in deprecated folders too; modular ones aside."""
    found = set()
    for name in dir(diffusers):
        if not name.endswith("Pipeline") or name.endswith("ModularPipeline"):
            continue
        module = importlib.import_module(getattr(diffusers, name).__module__)
        speaks = ("num_frames", "video_length", "VideoProcessor")
        if ".utils." not in module.__name__ and any(word in inspect.getsource(module) for word in speaks):
            found.add(name)
    return found


def test_every_case_has_a_row_and_every_refusal_a_reason(committed):
    rows = committed["rows"]
    assert list(rows) == list(PIPELINES)
    assert {name for name, row in rows.items() if row["capture"] == "no"} == set(WITHOUT_MAPS)
    assert {name: row["why"] for name, row in rows.items() if "why" in row} == WITHOUT_MAPS
    for name, row in rows.items():
        assert row["denoiser"] == PIPELINES[name].denoiser
        missing = {"capture", "gradient", "swap", "vico", "cvg", "vstar", "gen1"} - row.keys()
        assert not missing, name
    assert committed["left_out"] == LEFT_OUT
    spans = {name: row["releases"] for name, row in rows.items() if "releases" in row}
    assert spans == table.releases()


def test_the_page_is_that_of_the_numbers(committed):
    assert table.PAGE.read_text() == table.page(committed)


def test_the_readme_has_its_numbers(committed):
    number = table.counts(committed)
    text = " ".join((table.DOCS.parent / "README.md").read_text().split())
    said = (
        f"each of {number['rows']} tiny pipelines, written by the tests: captured maps are those of eager PyTorch,"
        f" layer by layer, on {number['capture']} of them ({number['classes']} pipeline classes,"
        f" {number['denoisers']} denoisers), and a step is guided by Vico on {number['vico']}."
    )
    assert said in text


@pytest.mark.drawn(8, of="long tests")
def test_no_pipeline_of_diffusers_is_forgotten(committed):
    """One that is new must get a tiny pipeline or a reason."""
    named = {row["pipeline"] for row in committed["rows"].values()} | set(LEFT_OUT)
    assert video_pipelines() - named == set()


def test_bounds_have_room_and_do_not_wander():
    assert table.settled(3e-8, None) == 1e-6 and table.settled(2e-8, None) == 1e-7
    assert table.settled(9e-7, 1e-6) == 1e-6 and table.settled(2e-6, 1e-6) == 1e-5
    assert table.settled(5e-6, None, 1e-5) == 1e-5 and table.settled(0.0, 1e-6) == 1e-7
    assert table.settled("yes", "no") == "yes"
    assert table.agrees(9e-7, 1e-6) and not table.agrees(2e-6, 1e-6)
    assert not table.agrees(1e-7, "no") and not table.agrees("no", 1e-6) and table.agrees("no", "no")
