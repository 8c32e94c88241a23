"""The short way into an operation, around torch's dispatcher.

A registered operation costs more Python than a fused kernel of torch takes as a whole on a small layer. Where nobody
but autograd looks at a call, its forward pass is called as it is, or as a `torch.autograd.Function`. Compilers,
tracers, profilers, fake tensors, subclasses and transforms get the registered operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from cvg_kernels.ops._trace import carrying_record

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), int, float, bool, str, list})


def directly(operation: Callable[..., Any], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation as a function that calls its implementation by itself where nobody looks.

    Args:
        operation: as registered.
        implementation: implementation of the operation on the CPU and on GPUs. None of its arguments is a list of
            tensors.
    """

    def call(*given):
        return (operation if somebody_looks(given) else implementation)(*given)

    return call


def with_shortcut(
    operation: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    setup_context: Callable[..., None],
) -> Callable[..., Any]:
    """As `directly`, of an operation with a gradient.

    Args:
        operation: as registered, with its gradient.
        forward: its implementation on the CPU and on GPUs. None of its arguments is a list of tensors.
        backward: its gradient, `backward(ctx, *grads)`.
        setup_context: what the forward pass leaves for it, `setup_context(ctx, inputs, output)`.
    """
    differentiate, remember = carrying_record(backward, setup_context)

    class Shortcut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            output = forward(*given)
            remember(ctx, given, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return differentiate(ctx, *grads)

    def call(*given):
        if somebody_looks(given):
            return operation(*given)
        if torch.is_grad_enabled() and any(one.requires_grad for one in given if isinstance(one, torch.Tensor)):
            return Shortcut.apply(*given)
        return forward(*given)

    return call


def somebody_looks(given: tuple) -> bool:
    """Whether a compiler, a transform, a tracer or a profiler watches the operations of torch, or tensors are not
    plain.
    """
    return (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, given))
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
        or any(one.is_meta for one in given if isinstance(one, torch.Tensor))
    )
