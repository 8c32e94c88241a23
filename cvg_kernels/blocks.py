"""Context managers that are generators, and that say what is wrong where one is entered twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from functools import wraps
from typing import Generic, ParamSpec, TypeVar

from cvg_kernels.errors import ArgumentError

_Given = ParamSpec("_Given")
_Yielded = TypeVar("_Yielded")


class Block(ContextDecorator, Generic[_Yielded]):
    """What a function of `block` returns: enters it anew each time, and once at a time."""

    def __init__(self, name: str, make: Callable[[], AbstractContextManager[_Yielded]]) -> None:
        self._name, self._make = name, make
        self._open: AbstractContextManager[_Yielded] | None = None

    def _recreate_cm(self) -> Block[_Yielded]:
        return Block(self._name, self._make)  # as a decorator: one for each call

    def __enter__(self) -> _Yielded:
        if self._open is not None:
            raise ArgumentError(
                f"this block of {self._name}(…) is open already: leave it first, or call {self._name}(…) again"
            )
        self._open = self._make()
        try:
            return self._open.__enter__()
        except BaseException:
            self._open = None
            raise

    def __exit__(self, *error: object) -> bool | None:
        opened, self._open = self._open, None
        return None if opened is None else opened.__exit__(*error)  # pyright: ignore[reportArgumentType]


def block(function: Callable[_Given, Iterator[_Yielded]]) -> Callable[_Given, Block[_Yielded]]:
    """Makes a context manager of a generator, as `contextlib.contextmanager` does, that can be entered again once it
    was left.

    Args:
        function: a generator that yields once.
    """
    make = contextmanager(function)

    @wraps(function)
    def made(*args: _Given.args, **options: _Given.kwargs) -> Block[_Yielded]:
        return Block(function.__name__, lambda: make(*args, **options))

    return made
