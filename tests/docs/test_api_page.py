"""docs/api.md has an entry for everything that is public, and everything public says what it is."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import types

import pytest

pytest.importorskip("diffusers")  # the editing pipeline derives from one of its classes

import cvg_kernels  # noqa: E402
from tests.docs.pages import ROOT, entries  # noqa: E402

PACKAGES = (
    "cvg_kernels",
    "cvg_kernels.capturing",
    "cvg_kernels.composition",
    "cvg_kernels.editing",
    "cvg_kernels.guidance",
    "cvg_kernels.ops",
    "cvg_kernels.shapes",
    "cvg_kernels.viz",
)


def public(module: types.ModuleType) -> dict[str, object]:
    """Name → what it is; a module without a list has the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_public_has_an_entry_and_a_docstring(package, entries):
    names = public(importlib.import_module(package))
    assert names
    for name, value in names.items():
        if isinstance(value, (types.ModuleType, str)):
            continue  # a module is in PACKAGES, the version in the text
        home = f"{value.__module__}.{value.__qualname__}"
        assert home in entries, f"docs/api.md needs `::: {home}` for {package}.{name}"
        assert (inspect.getdoc(value) or "").strip(), home


def test_modules_among_the_public_names_are_looked_at():
    there = {
        f"cvg_kernels.{name}" for name, value in public(cvg_kernels).items() if isinstance(value, types.ModuleType)
    }
    assert there <= set(PACKAGES)


def test_entries_exist_under_the_name_that_the_page_gives_them(entries):
    for home, name in entries.items():
        module, _, leaf = name.rpartition(".")
        value = getattr(importlib.import_module(module), leaf)
        assert f"{value.__module__}.{value.__qualname__}" == home, name
