"""What takes things away is not cut off in the middle: an interrupt from the keyboard comes behind it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


def uninterrupted(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function, and raises the `KeyboardInterrupt` that somebody wanted meanwhile when it is done.

    Only the main thread is interrupted by the keyboard, and only there is something to hold back.

    Args:
        function: that takes away what is on a pipeline.
        *args: its arguments.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        return function(*args)
    held: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *given: held.append(given))
    try:
        return function(*args)
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[-1])


def each_of(function: Callable[..., Any], arguments: list[tuple]) -> None:
    """Calls a function with one set of arguments after the other, the rest too where one fails."""
    with ExitStack() as stack:
        for given in reversed(arguments):
            stack.callback(function, *given)
