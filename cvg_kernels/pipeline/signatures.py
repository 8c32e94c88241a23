"""Arguments by name, also of methods that hand on what they are given."""

from __future__ import annotations

import inspect
from typing import Any


def named_arguments(kind: type, method: str, known: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a method, by name.

    Args:
        kind: the class.
        method: its name.
        known: an argument by which a signature that names them is known.
        args: positional, without the object itself.
        kwargs: by name.
    """
    signature = naming_signature(kind, method, known)
    given = signature.bind_partial(None, *args).arguments
    given.pop(next(iter(signature.parameters)))
    return {**given, **kwargs}


def naming_signature(kind: type, method: str, known: str) -> inspect.Signature:
    """The signature of a method that names its arguments.

    Somebody's own class may override a method with `(*args, **kwargs)`: then it is that of the nearest base.

    Args:
        kind: the class.
        method: its name.
        known: an argument by which a signature that names them is known.
    """
    signatures = [inspect.signature(vars(base)[method]) for base in kind.__mro__ if method in vars(base)]
    return next((one for one in signatures if known in one.parameters), signatures[0])
