"""The page of `write_viewer` in a real browser: Chromium without a window, driven by Playwright.

It runs where Playwright is installed (the extra `browser`) and a Chromium is found: the one that CVG_CHROMIUM names,
one of the machine, or the one that `playwright install chromium` fetched.
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from cvg_kernels.capturing.viewer import write_viewer
from tests.capturing.records import Captured

sync_api = pytest.importorskip("playwright.sync_api")

INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    named = os.environ.get("CVG_CHROMIUM") or next(filter(None, map(shutil.which, INSTALLED)), None)
    with sync_api.sync_playwright() as playwright:
        if not (named or os.path.exists(playwright.chromium.executable_path)):
            pytest.skip("no Chromium on this machine (CVG_CHROMIUM names one)")
        with playwright.chromium.launch(executable_path=named, args=["--no-sandbox"]) as chromium:
            yield chromium


@pytest.fixture
def page(browser, tmp_path):
    """The page of two clips of three frames, first red, then green, then blue; it plays until a test stops it."""
    frames = torch.eye(3)[:, :, None, None].expand(3, 3, 16, 16)
    first, second = Captured(frames=3), Captured(frames=3)
    for captured in (first, second):
        for record in captured.records:
            record.maps.fill_(0.05)
    for record in first.records:  # of "cat" in the top right corner of the second frame
        record.maps[0, 0, 1, 0, -1] = 0.4
    path = write_viewer(
        tmp_path / "index.html", {"plain": (frames, first), "guided": (frames, second)}, prompt="a <cat>"
    )
    page = browser.new_page()
    page.set_default_timeout(120_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else errors.append(asked.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.body.dataset.ready === 'yes'")
    yield page
    page.close()
    assert not errors


def show(page, frame: int) -> None:
    """Stops the page at a frame."""
    slider = page.locator("#frame")
    slider.fill(str(frame))
    assert page.locator("#play").text_content() == "Play"
    assert page.locator("#number").text_content() == str(frame)


def colour(page, clip: int, x: float, y: float) -> list[int]:
    """Red, green and blue of a canvas at a place (shares of its sides)."""
    ask = """(canvas, [x, y]) => [...canvas.getContext('2d').getImageData(
        Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data.slice(0, 3)]"""
    return page.locator("canvas").nth(clip).evaluate(ask, [x, y])


def test_both_clips_play_in_step(page):
    assert page.locator("#prompt").text_content() == "a <cat>"
    assert page.locator("h2").all_text_contents() == ["plain", "guided"]
    page.locator("#play").wait_for()
    before = page.locator("#number").text_content()
    page.wait_for_function("was => document.getElementById('number').textContent !== was", arg=before)
    for frame in (2, 0, 1):
        show(page, frame)
        for clip in (0, 1):
            seen = colour(page, clip, 0.5, 0.5)
            assert seen.index(max(seen)) == frame and max(seen) > 200 and sorted(seen)[1] < 60


def test_the_words_under_the_mouse_are_ranked(page):
    show(page, 1)
    canvas = page.locator("canvas").first
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] - 3, "y": 3})
    rows = page.locator(".ranks").nth(0).locator(".rank")
    assert rows.first.locator("span").all_text_contents() == ["cat", "40.0 %"]
    assert page.locator(".ranks").nth(1).locator(".rank").count() == rows.count()  # both clips, at the same place
    canvas.hover(position={"x": 3, "y": 3})
    figures = [row.locator("span").last.text_content() for row in rows.all()]
    assert figures == ["5.0 %"] * rows.count()


def test_a_word_is_laid_over_the_clips(page):
    show(page, 1)
    before = colour(page, 0, 0.98, 0.02), colour(page, 0, 0.02, 0.98)
    page.locator("#word").select_option("cat")
    bright, dark = colour(page, 0, 0.98, 0.02), colour(page, 0, 0.02, 0.98)
    assert (bright, dark) != before
    assert bright[0] > 150 and dark[0] < 60  # inferno's bright end has red, and green clips have none
    page.locator("#step").select_option("1")
    page.locator("#layer").select_option("fine")
    assert colour(page, 0, 0.98, 0.02)[0] > 150
