"""Arguments by name, also of methods that hand on what they are given."""

from __future__ import annotations

import inspect
from typing import Any


def named_arguments(
    kind: type, method: str, known: str, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of a method, by name.

    Somebody's own class may override a method with `(*args, **kwargs)`: then the nearest base that names its arguments
    says what the positional ones are.

    Args:
        kind: the class.
        method: its name.
        known: an argument by which a signature that names them is known.
        args: positional, without the object itself.
        kwargs: by name.
    """
    signatures = [
        inspect.signature(vars(base)[method]) for base in kind.__mro__ if method in vars(base)
    ]
    naming = (one for one in signatures if known in one.parameters)
    signature = next(naming, signatures[0])
    given = signature.bind_partial(None, *args).arguments
    given.pop(next(iter(signature.parameters)))
    return {**given, **kwargs}
