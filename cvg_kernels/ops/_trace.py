"""Which backend ran: a record for tests and benchmarks, kept per context and off by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_record: ContextVar[list[tuple[str, str]] | None] = ContextVar("backend_record", default=None)


@contextmanager
def trace_backends() -> Iterator[list[tuple[str, str]]]:
    """Collects `(operation, backend)` of every kernel call made inside the `with` block.

    A backward pass is an operation of its own, `attention_backward`. Those run by autograd's own threads (GPU) are not
    seen; on the CPU they are. Kernels called by compiled code are seen; the reference, once compiled, is not: nothing
    of it is left to call.
    """
    calls: list[tuple[str, str]] = []
    token = _record.set(calls)
    try:
        yield calls
    finally:
        _record.reset(token)


def note_backend(operation: str, backend: str) -> None:
    """Adds a call to the record of the context, if there is one."""
    if torch.compiler.is_compiling():
        return
    calls = _record.get()
    if calls is not None:
        calls.append((operation, backend))
