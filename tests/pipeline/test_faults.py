"""A fault at any call of the package's own functions, one after the other, as SQLite fails every allocation in turn.

What attaches, runs and detaches a method is counted once, call by call. Then it is done again and a chosen call fails.
Afterwards nothing is left on the pipeline: it runs as if it had never been touched, and guided it gives what it gave.
In what takes things away only the keyboard interrupts, by a true signal, which waits until that is done. `--faults N`
lets more calls fail.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.matrix import METHODS, WORDS, Built  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PACKAGE = str(Path(cvg.__file__).parent)
ERRORS = [RuntimeError("planted"), KeyboardInterrupt(), torch.OutOfMemoryError("planted"), MemoryError()]
#: What takes things away, and the calls that lead there: an interrupt right at their beginning is one before them.
TAKES_AWAY = "uninterrupted"
LEADS_THERE = ("uninterrupted", "__exit__", "detach", "restore", "remove", "close", "_end")


class Calls:
    """Counts the calls of the package's functions within a block; the one with number `at` raises `error` instead."""

    def __init__(self, at: int | None = None, error: BaseException | None = None) -> None:
        self.at, self.error, self.count = at, error, 0
        self.failed: str | None = None  #: the function that failed

    def __enter__(self) -> Calls:
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_) -> None:
        sys.setprofile(None)

    def _called(self, frame, event, _) -> None:
        # A generator is entered many times; its beginning counts.
        if event != "call" or frame.f_lasti > 0 or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        self.count += 1
        if self.at is None or self.count <= self.at or self.failed:
            return
        taking_away = TAKES_AWAY in names_around(frame.f_back)
        if not taking_away and frame.f_code.co_name in LEADS_THERE:
            return  # the next one
        self.failed = f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}"
        if taking_away:
            self.error = KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        else:
            raise self.error


def names_around(frame) -> set[str]:
    """Names of the functions that a frame runs in, its own among them."""
    names = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def guided(built: Built, key: str) -> torch.Tensor:
    with METHODS[key](built, 1).attach(built.pipe):
        return built.run()


def captured(built: Built, _: str) -> torch.Tensor:
    with cvg.capture(built.pipe, WORDS) as found:
        built.run()
    return found.heat_map("cat")


def swapped(built: Built, _: str) -> torch.Tensor:
    with cvg.processors(built.pipe):
        return built.run()


@pytest.mark.drawn(3)
@pytest.mark.parametrize(
    ("name", "call", "key"),
    [
        ("animatediff", guided, "vico"),
        ("animatediff", guided, "vstar"),
        ("animatediff", guided, "gen1"),
        ("wan", guided, "vico"),
        ("cogvideox", captured, "capture"),
        ("latte", swapped, "swap"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_fault_anywhere_leaves_nothing_behind(name, call, key, pytestconfig):
    built = Built.of(name)
    want = call(built, key)
    with Calls() as calls:
        assert torch.equal(call(built, key), want)
    assert calls.count > 100
    count = min(pytestconfig.getoption("--faults"), calls.count)
    for at in np.random.default_rng(torch.initial_seed()).choice(calls.count, count, replace=False).tolist():
        fail(built, call, key, want, at)


def fail(built: Built, call, key: str, want: torch.Tensor, at: int) -> None:
    """Lets the call with a number fail, and asserts that the fault is told and leaves nothing.

    Where the words' places are looked for in one way, and in another if that fails, the result is the same.
    """
    with Calls(at, ERRORS[at % len(ERRORS)]) as planted:
        try:
            found, told = call(built, key), None
        except BaseException as raised:
            found, told = None, raised
    place = f"{planted.error!r} in {planted.failed}, call {at}"
    if planted.failed is None:  # only calls that lead to the taking away were left
        return
    if planted.error is KeyboardInterrupt:
        assert isinstance(told, KeyboardInterrupt), f"{place}: became {told!r}"
    elif told is not None:
        assert planted.error in causes(told), f"{place}: became {told!r}"
    else:
        assert torch.equal(found, want), f"{place}: was swallowed, and the result is another"
    try:
        built.runs_as_before()
        assert torch.equal(call(built, key), want)
    except AssertionError as left:
        raise AssertionError(f"after {place}: {left}") from left


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it came from."""
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
