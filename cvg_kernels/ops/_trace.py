"""Which backend ran: a record for tests and benchmarks, kept per context and off by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from cvg_kernels.blocks import block


class _Record:
    """The calls of one `with` block, and whether it is still open."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.open = True


_record: ContextVar[_Record | None] = ContextVar("backend_record", default=None)


@block
def trace_backends() -> Iterator[list[tuple[str, str]]]:
    """Collects `(operation, backend)` of every kernel call made inside the `with` block.

    A backward pass is an operation of its own, `attention_backward`. On a GPU autograd runs it in threads of its own,
    which know nothing of this block: it is seen there if its forward pass ran inside the block and was not compiled.
    Kernels called by compiled code are seen; the reference, once compiled, is not: nothing of it is left to call.

    Examples:
        >>> with cvg.trace_backends() as calls:
        ...     product = cvg.min_max_matmul(torch.rand(1, 2, 3), torch.rand(1, 3, 4), backend="reference")
        >>> calls
        [('min_max_matmul', 'reference')]
    """
    record = _Record()
    token = _record.set(record)
    try:
        yield record.calls
    finally:
        record.open = False
        _record.reset(token)


def note_backend(operation: str, backend: str) -> None:
    """Adds a call to the record of the context, if there is one."""
    if torch.compiler.is_compiling():
        return
    record = _record.get()
    if record is not None:
        record.calls.append((operation, backend))


def carrying_record(
    backward: Callable[..., Any], setup_context: Callable[..., None]
) -> tuple[Callable[..., Any], Callable[..., None]]:
    """The two functions of a gradient, which take the record along to the thread that runs the backward pass.

    Args:
        backward: the gradient, `backward(ctx, *grads)`.
        setup_context: what the forward pass leaves for it, `setup_context(ctx, inputs, output)`.
    """

    def remember(ctx, inputs, output) -> None:
        setup_context(ctx, inputs, output)
        ctx.backend_record = _record.get()

    def differentiate(ctx, *grads):
        record = ctx.backend_record
        if record is None or not record.open or _record.get() is not None:
            return backward(ctx, *grads)
        token = _record.set(record)
        try:
            return backward(ctx, *grads)
        finally:
            _record.reset(token)

    return differentiate, remember


def register_autograd(operation: str, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
    """Registers a gradient as `torch.library.register_autograd` does, its functions as in `carrying_record`."""
    differentiate, remember = carrying_record(backward, setup_context)
    torch.library.register_autograd(operation, differentiate, setup_context=remember)
