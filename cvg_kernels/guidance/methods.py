"""Guidance methods by name, as the command line spells them: `cvg`, `gen1:temporal_scale=2`, `vico:stop=0.2+gen1`."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from cvg_kernels.errors import ArgumentError, nearest
from cvg_kernels.guidance.base import Guidance
from cvg_kernels.guidance.cvg import CVG
from cvg_kernels.guidance.flowmo import FlowMo
from cvg_kernels.guidance.gen1 import Gen1
from cvg_kernels.guidance.temporal_band import TemporalBand
from cvg_kernels.guidance.together import Together
from cvg_kernels.guidance.vico import Vico
from cvg_kernels.guidance.vstar import VSTAR
from cvg_kernels.prompts.tokens import Word

METHODS = {
    "none": None,
    "cvg": CVG,
    "vico": Vico,
    "vstar": VSTAR,
    "gen1": Gen1,
    "temporal-band": TemporalBand,
    "flowmo": FlowMo,
}

#: Old names of options, which still work and are not shown.
_OLD = ("until", "steps")
#: Options that ask for arguments of the pipeline's call, which are made in Python (`Gen1.inputs`).
_INPUTS = ("structure", "content")


def method_named(spec: str, words: Sequence[Word] | None = None) -> Any:
    """Makes what a specification says: names, each with its options after colons, joined by a plus.

    Args:
        spec: `name[:option=value…][+name…]`. Names are those of `METHODS`, options the attributes of the method; a
            value is a number, `None`, `True`, `False`, a Python literal, or else a string. `"none"` stands alone.
        words: what methods with words look at; `None` leaves the choice to them.

    Returns:
        A method, or `None` for `"none"`.

    Raises:
        ArgumentError: for an unknown name or option (lists those there are), or a value that does not fit.
    """
    parts = _split(spec, r"\+(?=[A-Za-z_])")  # not the plus of 1e+3
    methods = [_one(part, words) for part in parts]
    if len(methods) == 1:
        return methods[0]
    if None in methods:
        raise ArgumentError(f"guidance 'none' cannot be combined with others, got {spec!r}")
    return Together(tuple(methods))


def methods_named(specs: str) -> dict[str, Any]:
    """Makes several methods, each under its specification.

    Args:
        specs: what `method_named` takes, separated by commas; commas in brackets belong to a value.

    Raises:
        ArgumentError: as `method_named`, and for one that is given twice.
    """
    each = _split(specs, ",")
    if len(set(each)) < len(each):
        raise ArgumentError(f"guidance methods must differ, got {specs!r}")
    return {spec: method_named(spec) for spec in each}


def _split(text: str, separator: str) -> list[str]:
    """Splits at a regular expression where no bracket is open, and no quotation mark."""
    parts, begin, depth, quote = [], 0, 0, ""
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif depth == 0 and re.compile(separator).match(text, at):
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]]


def _one(spec: str, words: Sequence[Word] | None) -> Any:
    """One method with its options."""
    name, *given = _split(spec.strip(), ":")
    if name not in METHODS:
        raise ArgumentError(f"guidance must be one of {', '.join(METHODS)}, got {name!r}{nearest(name, METHODS)}")
    kind = METHODS[name]
    accepted = [] if kind is None else [field.name for field in fields(kind)]
    if kind is not None and kind.before_step is Guidance.before_step:
        accepted.remove("checkpointing")  # it differentiates nothing
    accepted = [one for one in accepted if one not in _INPUTS]
    shown = [one for one in accepted if one not in _OLD]
    options = {"words": words} if "words" in accepted else {}
    for pair in given:
        option, equals, value = pair.partition("=")
        if not equals or option not in accepted:
            raise ArgumentError(
                f"guidance {name!r} takes option=value with the options {', '.join(shown) or 'none'}; got {pair!r}"
                f"{'' if option in accepted else nearest(option, shown)}"
            )
        options[option] = _value(value)
    if kind is None:
        return None
    try:
        return kind(**options)
    except ArgumentError as error:
        raise ArgumentError(f"guidance {name!r}: {error}") from None
    except TypeError as error:  # a value of another type than the method compares it with
        raise ArgumentError(f"guidance {spec!r} cannot be made: {error}") from None


def _value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
