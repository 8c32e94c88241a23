"""Transforms of torch.func and forward-mode differentiation: who can serve a call under them.

The kernels are registered with a gradient in reverse mode. Under forward mode torch would drop the tangents without a
word, under `torch.func.grad` it stops with a message about its own internals, and `torch.vmap` cannot split lists of
tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch.autograd import forward_ad

from cvg_kernels.backends import Backend, parse_backend
from cvg_kernels.errors import BackendUnavailableError

if TYPE_CHECKING:
    import torch._C._functorch  # which torch has loaded; checkers must be told

Transform = Literal["vmap", "derivative"]

_NAMES: dict[Transform, str] = {"vmap": "torch.vmap", "derivative": "a derivative of torch.func or in forward mode"}


#: The compiler of torch 2.8 cannot make a member of an enumeration from its value under Python 3.12.
_BY_NAME = {backend.value: backend for backend in Backend}


def backend_under_transforms(
    operation: str,
    backend: str | Backend,
    tensors: Iterable[torch.Tensor | None],
    *,
    kernels: tuple[Transform, ...] = ("vmap",),
    reference: tuple[Transform, ...] = ("vmap", "derivative"),
) -> Backend:
    """The backend of a call, where `auto` is the reference if a transform needs it.

    Args:
        operation: its name in messages.
        backend: as the user named it.
        tensors: tensors of the call.
        kernels: transforms that the kernels can run under.
        reference: those that the reference can run under.

    Raises:
        ArgumentError: for a name that is none.
        BackendUnavailableError: if the named backend, or none at all, can run under the transforms of this call.
    """
    parsed = parse_backend(backend)
    if torch.compiler.is_compiling():
        return _BY_NAME[_decide_compiled(operation, parsed.value, kernels, reference)]
    if not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
        return parsed
    active = _active(tensors)
    return Backend(_decide(operation, parsed.value, active, kernels, reference)) if active else parsed


def _decide(operation: str, name: str, active: set[Transform], kernels, reference) -> str:
    """The name of the backend that serves a call under these transforms."""
    by_kernels, by_reference = active <= set(kernels), active <= set(reference)
    if by_reference if name == Backend.REFERENCE.value else by_kernels:
        return name
    if name == Backend.AUTO.value and by_reference:
        return Backend.REFERENCE.value
    what = " and ".join(_NAMES[one] for one in sorted(active))
    remedy = "torch.autograd.grad differentiates it, and samples go in as a batch"
    if by_reference:
        remedy = "backend='reference' is plain PyTorch and can"
    elif by_kernels:
        remedy = "backend='auto' can"
    raise BackendUnavailableError(f"backend {name!r} cannot run {operation} under {what}; {remedy}")


def _decide_compiled(operation: str, name: str, kernels, reference) -> str:
    """As `_decide`, while a graph is traced:
    tensors cannot be looked at, so every transform around the call counts.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = {interpreter.key().name for interpreter in stack}
    active: set[Transform] = {"vmap"} if "Vmap" in kinds else set()
    if kinds & {"Grad", "Jvp"} or forward_ad._current_level >= 0:
        active.add("derivative")
    return _decide(operation, name, active, kernels, reference) if active else name


# What `torch.compiler.assume_constant_result` does; the compiler traces anew where transforms change.
_decide_compiled._dynamo_marked_constant = True


def _active(tensors: Iterable[torch.Tensor | None]) -> set[Transform]:
    """The transforms that these tensors take part in."""
    found: set[Transform] = set()
    wrapped = torch._C._are_functorch_transforms_active()
    dual = forward_ad._current_level >= 0
    if not wrapped and not dual:
        return found
    for tensor in tensors:
        if tensor is None:
            continue
        while wrapped and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            batched = torch._C._functorch.is_batchedtensor(tensor)
            found.add("vmap" if batched else "derivative")
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if dual and forward_ad.unpack_dual(tensor).tangent is not None:
            found.add("derivative")
    return found
