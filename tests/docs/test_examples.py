"""The examples in the docstrings of everything public run, and say what they print."""

from __future__ import annotations

import doctest
import importlib
import inspect
import sys

import pytest
import torch

pytest.importorskip("diffusers")  # the editing pipeline derives from one of its classes

import cvg_kernels  # noqa: E402
from cvg_kernels import ops  # noqa: E402
from tests.docs.pages import ROOT, entries  # noqa: E402

#: What stands before every example; docs/api.md says so.
NAMES = {"cvg": cvg_kernels, "torch": torch}


def examples(value: object, name: str) -> list[doctest.DocTest]:
    """The examples of something public and of its methods."""
    module = sys.modules[value.__module__]
    found = doctest.DocTestFinder(exclude_empty=True).find(value, name, module, dict(NAMES))
    return [one for one in found if one.examples]


def public(home: str) -> object:
    """What an entry of docs/api.md is about."""
    module, _, name = home.rpartition(".")
    return getattr(importlib.import_module(module), name)


HOMES = sorted(entries())


@pytest.mark.parametrize("home", [home for home in HOMES if ">>>" in (inspect.getdoc(public(home)) or "")])
def test_examples_print_what_they_say(home):
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in examples(public(home), home):
        runner.run(example, out=said.append)
    assert runner.tries > 0
    assert not runner.failures, "".join(said)


def test_every_operation_has_an_example():
    named = [getattr(ops, name) for name in ops.__all__]
    without = [value.__name__ for value in named if inspect.isfunction(value) and not examples(value, value.__name__)]
    assert not without


def test_the_page_says_what_stands_before_the_examples():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert "Examples run after `import torch` and\n`import cvg_kernels as cvg`." in page
