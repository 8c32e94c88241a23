"""Defaults of options, where the module that has them takes seconds to import: they are read from its source."""

from __future__ import annotations

import ast
import importlib.util
from contextlib import suppress
from typing import Any


def defaults_of(module: str, name: str | None = None) -> dict[str, Any]:
    """Reads the defaults of a dataclass, or the constants of a module, without importing the module.

    So a default has one place, and `--help` need not wait for torch.

    Args:
        module: name of the module; the packages above it are imported.
        name: name of the dataclass; `None` reads the module's own constants.

    Returns:
        Name → value, of those that are literals.
    """
    spec = importlib.util.find_spec(module)
    tree = ast.parse(spec.loader.get_source(module))
    body = tree.body
    if name is not None:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            target, value = node.target, node.value
        elif isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
        else:
            continue
        if isinstance(target, ast.Name) and value is not None:
            with suppress(ValueError):
                found[target.id] = ast.literal_eval(value)
    return found
