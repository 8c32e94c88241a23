"""docs/api.md has an entry for everything that is public; everything public says what it is and has types."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("diffusers")  # the editing pipeline derives from one of its classes

import cvg_kernels  # noqa: E402
from tests.docs.pages import entries  # noqa: E402

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


def home_of(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def found(home: str) -> Any:
    """What an entry is about."""
    module, _, name = home.rpartition(".")
    return getattr(importlib.import_module(module), name)


CLASSES = [home for home in entries() if inspect.isclass(found(home))]


def said(value: object) -> str:
    return (inspect.getdoc(value) or "").strip()


def function_of(member: Any) -> Any:
    """The function of a method or property of a class, `None` for what is neither."""
    member = member.fget if isinstance(member, property) else getattr(member, "func", member)
    member = inspect.unwrap(getattr(member, "__func__", member))
    return member if inspect.isfunction(member) else None


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines itself."""
    for name, member in vars(kind).items():
        if (not name.startswith("_") or name == "__call__") and function_of(member) is not None:
            yield name, function_of(member)


def attributes(kind: type) -> set[str]:
    """Public attributes that a class declares or sets on itself, but for those of its methods and properties."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    names = set()
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return {name for name in names if not name.startswith("_")} - {name for name, _ in methods(kind)}


def documented(kind: type) -> set[str]:
    """What the sections of a class's docstring, and of those that it derives from, have a line for."""
    lines = "\n".join(said(one) for one in kind.__mro__ if one.__module__.startswith("cvg_kernels"))
    return set(re.findall(r"^    (\w+): ", lines, re.MULTILINE))


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_public_has_an_entry_and_a_docstring(package):
    there, names = entries(), public(importlib.import_module(package))
    assert names
    for name, value in names.items():
        if isinstance(value, (types.ModuleType, str)):
            continue  # a module is in PACKAGES, the version in the text
        assert home_of(value) in there, f"docs/api.md needs `::: {home_of(value)}` for {package}.{name}"
        assert said(value), home_of(value)


@pytest.mark.parametrize("home", CLASSES)
def test_public_classes_tell_of_their_methods_and_attributes(home):
    kind, there = found(home), entries()
    for base in kind.__mro__:
        if base is not kind and base.__module__.startswith("cvg_kernels") and "_" not in base.__name__[:1]:
            inherited = [name for name, _ in methods(base)]
            assert home_of(base) in there or not inherited, f"docs/api.md needs {base}, which has {inherited}"
    silent = [name for name, method in methods(kind) if not said(method) and not said(getattr(kind, name))]
    assert not silent, f"{home} needs docstrings of {silent}"
    untold = attributes(kind) - documented(kind)
    assert not untold, f"the docstring of {home} needs lines for {sorted(untold)}"


def test_everything_public_has_types():
    callables = [found(home) for home in entries()]
    callables += [method for home in CLASSES for _, method in methods(found(home))]
    callables += [vars(found(home)).get("__init__") for home in CLASSES]
    without = []
    for value in map(inspect.unwrap, filter(inspect.isfunction, callables)):
        if not value.__module__.startswith("cvg_kernels") or value.__code__.co_filename.startswith("<"):
            continue  # made by Protocol, dataclass or NamedTuple
        given = inspect.signature(value)
        names = [name for name, one in given.parameters.items() if one.annotation is one.empty]
        names = [name for name in names if name not in ("self", "cls")]
        returns = given.return_annotation is given.empty and value.__name__ != "__init__"
        if names or returns:
            without.append((home_of(value), names, "no return type" if returns else ""))
    assert not without


def test_modules_among_the_public_names_are_looked_at():
    there = {
        f"cvg_kernels.{name}" for name, value in public(cvg_kernels).items() if isinstance(value, types.ModuleType)
    }
    assert there <= set(PACKAGES)


def test_entries_exist_under_the_name_that_the_page_gives_them():
    for home, name in entries().items():
        module, _, leaf = name.rpartition(".")
        value = getattr(importlib.import_module(module), leaf)
        assert home_of(value) == home, name
