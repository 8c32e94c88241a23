"""Graphs of path flow, and how near to its definition a kernel must be."""

from __future__ import annotations

import torch

from tests.tolerance import assert_as_exact_as


def graph(sizes, dtype=torch.float32, device="cpu"):
    """Random cross maps and softmax hops, peaked enough that every kind of edge is a bottleneck somewhere."""
    batch, tokens, frames, positions, hops = sizes
    cross = torch.rand(batch, tokens, frames, positions, dtype=dtype)
    temporal = [(2 * torch.randn(batch, positions, frames, frames, dtype=dtype)).softmax(-1) for _ in range(hops)]
    return [tensor.to(device) for tensor in (cross, *temporal)]


def results(function, tensors, grad):
    """The result and the gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad)]


def assert_like_the_reference(kernel, definition, tensors, grad, temperature):
    """The kernel is as near to float64 as the definition in the kernel's own precision is.

    A soft product takes up to T ln 2 off what it is made of, so that a flow near 0 is a difference of terms as large
    as T. The gradient of the soft form hangs on e^(x/T), so a rounding of x counts 1/T times; it is a difference of
    terms as large as the gradient that arrives.
    """
    largest = max(1.0, *(tensor.abs().max().item() for tensor in tensors))
    depth = 16 + (0 if temperature is None else round((largest / temperature) ** 2))
    found = results(kernel, tensors, grad)
    stock = results(definition, tensors, grad)
    exact = results(definition, [tensor.double() for tensor in tensors], grad.double())
    sizes = [temperature or 0.0, *[grad.abs().max().item()] * len(tensors)]
    for have, eager, want, size in zip(found, stock, exact, sizes, strict=True):
        assert_as_exact_as(have, eager, want, factor=3, depth=depth, size=size)
