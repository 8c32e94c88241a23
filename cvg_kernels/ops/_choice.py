"""Which kernel serves a call: the named one, or under `auto` the first of the table that can.

Called inside the registered operations, where tensors are real: nothing here is ever traced by a compiler.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch

from cvg_kernels import auto
from cvg_kernels.backends import unavailable_reason
from cvg_kernels.errors import ArgumentError, BackendUnavailableError
from cvg_kernels.kernels import TRITON_BACKENDS, Backend, Facts, kernels_of
from cvg_kernels.ops._trace import note_backend

Result = TypeVar("Result")

#: Those whose failure may be the machine's: compiled here for this GPU, or torch's own, which differ from build to
#: build.
_REPLACEABLE = frozenset({Backend.STOCK, *TRITON_BACKENDS, Backend.CUDA})


class Choice(NamedTuple):
    """A kernel that serves a call."""

    backend: Backend
    module: ModuleType


def run_kernel(operation: str, backend: str | Backend, facts: Facts, call: Callable[[ModuleType], Result]) -> Result:
    """Runs a call on the kernel that serves it, and notes who that was.

    Under `auto` a kernel that fails to load, compile or launch is replaced by the next of the table, once for all
    calls on this device, with a warning. A named backend never is.

    Args:
        operation: a key of `KERNELS`, or one with `_backward` after it.
        backend: as the user named it.
        facts: facts of the call.
        call: what to do with the kernel's module; may run more than once.

    Raises:
        ArgumentError: if a named backend does not take the call.
        BackendUnavailableError: if a named backend cannot run here.
    """
    if backend != Backend.AUTO:
        chosen = _named(operation, backend, facts)
        result = call(chosen.module)
        note_backend(operation, chosen.backend.value)
        return result
    for candidate in _candidates(operation, facts):
        try:
            result = call(_module(operation, candidate))
        except BackendUnavailableError:
            # For this call: torch's operators can be switched off by a context.
            continue
        except Exception as error:
            if candidate not in _REPLACEABLE or _is_the_calls(error):
                raise
            _replace(operation, candidate, facts.device, error)
            continue
        note_backend(operation, candidate.value)
        return result
    raise AssertionError(f"{operation} has no reference")


def kernel_for(operation: str, backend: str | Backend, facts: Facts) -> Choice:
    """The kernel that serves a call; under `auto` the first that can.

    Args:
        operation: a key of `KERNELS`, or one with `_backward` after it.
        backend: as the user named it.
        facts: facts of the call.

    Raises:
        ArgumentError: if a named backend does not take the call.
        BackendUnavailableError: if a named backend cannot run here.
    """
    if backend == Backend.AUTO:
        first = _candidates(operation, facts)[0]
        return Choice(first, _module(operation, first))
    return _named(operation, backend, facts)


def forget_choices() -> None:
    """Decides anew from here on: after a change of tables, and between tests."""
    for cached in (
        _candidates,
        _named,
        _module,
        _failed,
        auto.users,
        auto.shipped,
        auto.architecture,
        auto.device_name,
    ):
        cached.cache_clear()


def why_not(operation: str, backend: Backend, facts: Facts) -> str | None:
    """Why a kernel cannot serve a call on this machine, or `None` if it can."""
    reason = unavailable_reason(operation, backend, facts.device, facts.dtype)
    return _refusal(operation, backend, facts) if reason is None else reason


@lru_cache(maxsize=4096)
def _named(operation: str, name: str, facts: Facts) -> Choice:
    backend = Backend(name)
    reason = unavailable_reason(operation, backend, facts.device, facts.dtype)
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend.value!r} cannot run {operation}: {reason}")
    refusal = _refusal(operation, backend, facts)
    if refusal is not None:
        raise ArgumentError(refusal)
    return Choice(backend, _module(operation, backend))


@lru_cache
def _module(operation: str, backend: Backend) -> ModuleType:
    return importlib.import_module(kernels_of(operation)[backend].module)


def _refusal(operation: str, backend: Backend, facts: Facts) -> str | None:
    """What of a call a kernel does not take, or `None`."""
    refused = kernels_of(operation)[backend].refusal(facts)
    if refused is None:
        return None
    what, taken = refused
    return (
        f"{operation} {what} is not supported by backend {backend.value!r}; it takes {taken} (the reference takes any)"
    )


@lru_cache(maxsize=4096)
def _candidates(operation: str, facts: Facts) -> tuple[Backend, ...]:
    """The kernels that can serve a call under `auto`, that of choice first, the reference last; none is loaded yet."""
    return tuple(
        backend
        for backend in auto.order(operation, facts)
        if (operation, backend, facts.device) not in _failed() and why_not(operation, backend, facts) is None
    )


@lru_cache
def _failed() -> set[tuple[str, Backend, torch.device]]:
    """The kernels that failed on a device; this process does not try them again under `auto`."""
    return set()


def _is_the_calls(error: Exception) -> bool:
    """Whether a failure says something about the call, not about the kernel: it would be the same with another."""
    if isinstance(error, (ArgumentError, MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error)


def _replace(operation: str, backend: Backend, device: torch.device, error: Exception) -> None:
    """Remembers that a kernel fails here, and says so the first time."""
    failure = (operation, backend, device)
    if failure in _failed():
        return  # in another thread, at the same time
    _failed().add(failure)
    _candidates.cache_clear()
    said = " ".join(str(error).split())[:300]
    warnings.warn(
        f"the {backend.value} kernel of {operation} fails on {device} ({type(error).__name__}: {said}); 'auto' goes "
        "on without it",
        RuntimeWarning,
        stacklevel=3,
    )
