"""One video on several processes: diffusers' context parallelism (`enable_parallelism`, ring and Ulysses attention).

Between the places where diffusers splits and gathers a sequence, every process has its share of the video's tokens. A
layer then attends in one of two ways:

    to a text that every process has (Wan)   the queries of the share, all heads    maps are gathered along the queries
    within Ulysses attention (LTX)           all queries, a share of the heads      maps are gathered over the heads

so that every process has the whole maps, computes the same loss of them, and differentiates it to its share of the
tokens: the gradient that reaches the latents is a part of the true one, and the parts of all processes are added up.
Every process must make the same calls in the same order, with the same latents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.models import arguments_of, model_of, unwrap


def context_of(network: nn.Module) -> Any | None:
    """Returns how diffusers spreads a network's sequence over processes, a `ContextParallelConfig`, or `None`.

    Args:
        network: a denoiser, or a processor of attention.
    """
    parallel = getattr(network, "_parallel_config", None)
    return getattr(parallel, "context_parallel_config", None)


def check_maps(denoiser: nn.Module) -> None:
    """Checks that whole maps can be had of a denoiser that runs on several processes.

    Raises:
        ArgumentError: under tensor parallelism, or context parallelism of a model whose tokens it does not keep in
            order.
    """
    network = unwrap(denoiser)
    kind = type(network).__name__
    parallel = getattr(network, "_parallel_config", None)
    if getattr(parallel, "tensor_parallel_config", None) is not None:
        raise ArgumentError(
            "the denoiser runs under tensor parallelism, where every process has some heads of each layer: maps of it "
            "cannot be captured; use context parallelism or one process"
        )
    if context_of(network) is None:
        return
    model = model_of(network)
    if model.joint or model.frames_in_batch:
        where = "with those of the text in one sequence" if model.joint else "frame by frame"
        raise ArgumentError(
            f"{kind} has the video's tokens {where}, whose shares under context parallelism cannot be put together: "
            "maps of it cannot be captured; run it on one process"
        )


def check_gradients(denoiser: nn.Module) -> None:
    """Checks that a denoiser on several processes can be differentiated.

    Raises:
        ArgumentError: if its attention has no backward pass, or its sequence is gathered more often than once: what
            lies between two such places is computed by every process, and would be counted by each.
    """
    network = unwrap(denoiser)
    context = context_of(network)
    if context is None:
        return
    for name in ("ulysses_anything", "ring_anything"):
        if getattr(context, name, False):
            raise ArgumentError(
                f"the denoiser runs under context parallelism with {name}, which diffusers cannot differentiate: "
                "methods that move the latents need even shares without it, or one process"
            )
    gathers = 0
    for module in network.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hooks = {} if registry is None else registry.hooks
        gathers += sum(type(hook).__name__ == "ContextParallelGatherHook" for hook in hooks.values())
    if gathers != 1:
        raise ArgumentError(
            f"{type(network).__name__} gathers its sequence at {gathers} places under context parallelism, and "
            "gradients through it would be wrong: methods that move the latents need a plan with one, or one process"
        )


def whole_maps(maps: torch.Tensor, denoiser: nn.Module, module: nn.Module, heads: int, queries: int) -> torch.Tensor:
    """Gathers the maps of a text layer from all processes; differentiable where the layer is.

    Args:
        maps: `[B, (heads,) K, N]` of this process.
        denoiser: the network.
        module: the attention layer.
        heads: that this process has computed.
        queries: that the whole layer has.

    Returns:
        `[B, (all heads,) K, queries]`; the maps as they are where no share is missing.

    Raises:
        ArgumentError: for shares that cannot be put together.
    """
    context = context_of(denoiser)
    if context is None:
        return maps
    if heads != module.heads:
        group, parts = context._ulysses_mesh.get_group(), context.ulysses_degree
        if heads * parts != module.heads:
            raise ArgumentError(
                f"context parallelism must share the heads of a layer evenly for its maps, got {module.heads} heads "
                f"over {parts} processes"
            )
        if maps.ndim == 4:
            return _gather(maps, 1, module.heads, group)
        return _gather(maps[None], 0, parts, group).mean(0)
    if maps.shape[-1] == queries:
        return maps
    return _gather(maps, maps.ndim - 1, queries, context._flattened_mesh.get_group())


def adding_up_gradients(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Returns the arguments of a denoiser call with latents whose gradient is the sum of those of all processes.

    Once, however often it is asked for; as they are where nothing is differentiated or spread.

    Args:
        denoiser: the network.
        args: by position.
        kwargs: by name.

    Raises:
        ArgumentError: if gradients through it would be wrong.
    """
    context = context_of(unwrap(denoiser))
    if context is None or not torch.is_grad_enabled():
        return args, kwargs
    arguments, name = arguments_of(denoiser, args, kwargs), model_of(denoiser).latents
    latents = arguments[name]
    if not latents.requires_grad or isinstance(latents.grad_fn, _AddUp._backward_cls):
        return args, kwargs
    check_gradients(denoiser)
    return (), {**arguments, name: _AddUp.apply(latents, context._flattened_mesh.get_group())}


def _gather(part: torch.Tensor, axis: int, size: int, group: Any) -> torch.Tensor:
    """Puts the shares of all processes one after the other."""
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [size // count + (process < size % count) for process in range(count)]  # as `tensor_split` does
    if part.shape[axis] != sizes[rank]:
        raise ArgumentError(
            f"a share of {sizes[rank]} of {size} was expected of process {rank}, got {part.shape[axis]}: the maps of "
            "its layers cannot be put together"
        )
    return _Gather.apply(part, axis, sizes, rank, group)


class _Gather(torch.autograd.Function):
    """Concatenates over processes; each keeps the gradient of its share, as of a loss that all compute alike."""

    @staticmethod
    def forward(ctx, part, axis, sizes, rank, group):
        ctx.axis, ctx.begin, ctx.length = axis, sum(sizes[:rank]), sizes[rank]
        sent = part.movedim(axis, 0)
        if missing := max(sizes) - sizes[rank]:  # all must send as much
            sent = torch.cat([sent, sent.new_zeros(missing, *sent.shape[1:])])
        received = [torch.empty_like(sent, memory_format=torch.contiguous_format) for _ in sizes]
        dist.all_gather(received, sent.contiguous(), group=group)
        whole = torch.cat([one[:size] for one, size in zip(received, sizes, strict=True)])
        return whole.movedim(0, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient.narrow(ctx.axis, ctx.begin, ctx.length), None, None, None, None


class _AddUp(torch.autograd.Function):
    """Passes values on, and adds up gradients over processes."""

    @staticmethod
    def forward(ctx, latents, group):
        ctx.group = group
        return latents.view_as(latents)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
