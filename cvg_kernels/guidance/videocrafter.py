"""VSTAR's band in VideoCrafter's own code (lvdm), which is no diffusers model: on its UNet, whatever sampler calls it.

Nothing of that code is imported. Its temporal attention is told by how it is built: inside a `TemporalTransformer`,
modules with projections `to_q`, `to_k`, `to_v` and `to_out` that are called with the frames of each position,
`(b h w) t c`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import temporal_attention
from cvg_kernels.pipeline.compiled import uncompiled
from cvg_kernels.pipeline.models import unet_grid

#: (columns of a layer's grid, columns of the latents) → options of `temporal_attention`.
Band = Callable[[int, int], dict[str, Any]]

_PARTS = ("to_q", "to_k", "to_v", "to_out", "heads", "scale")
_INPUT_LAYER = "init_attn"  # the released code leaves a network's first temporal layer alone


def temporal_attentions(unet: nn.Module) -> list[nn.Module]:
    """The attention modules of a network's `TemporalTransformer`s but the first, in their order.

    Raises:
        ArgumentError: if there is none, or one has relative positions, which the band is not defined for.
    """
    found = [
        part
        for name, transformer in unet.named_modules()
        if type(transformer).__name__ == "TemporalTransformer" and _INPUT_LAYER not in name
        for part in transformer.modules()
        if all(hasattr(part, attribute) for attribute in _PARTS)
    ]
    if not found:
        raise ArgumentError(
            f"unet must have attention modules inside a TemporalTransformer, got {type(unet).__name__} without"
        )
    if any(getattr(part, "relative_position", False) for part in found):
        raise ArgumentError("unet must have temporal attention without relative positions, got some with them")
    return found


def regularised(
    unet: nn.Module, band: Band, stop: float, train_steps: int, backend: str
) -> AbstractContextManager[None]:
    """Puts a band on the temporal attention of VideoCrafter's UNet for the length of a `with` block.

    Where the band is off, and where an attention module is called with a context, the module computes as ever.

    Args:
        unet: called as `unet(latents [B, C, F, H, W], timesteps, …)`.
        band: the options for a layer; none are no band.
        stop: calls with timesteps of at least (1 − stop) · train_steps are regularised.
        train_steps: how many timesteps the network was trained on.
        backend: which implementation of `temporal_attention` to use.

    Raises:
        ArgumentError: for a network without such attention.
    """
    return _regularised(unet, temporal_attentions(unet), band, (1 - stop) * train_steps, backend)


@contextmanager
def _regularised(
    unet: nn.Module, attentions: list[nn.Module], band: Band, lowest: float, backend: str
) -> Iterator[None]:
    # Of the last call, also when it is over: gradient checkpointing runs its layers once more.
    latents: tuple[int, ...] | None = None  # [B, C, F, H, W]
    early = False

    def begin_call(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal latents, early
        latents = tuple((args[0] if args else kwargs["x"]).shape)
        timesteps = args[1] if len(args) > 1 else kwargs["timesteps"]
        early = float(torch.as_tensor(timesteps).flatten()[0]) >= lowest

    def options(positions: int) -> dict[str, Any]:
        if latents is None:
            raise ArgumentError(
                f"unet must be the module that the sampler calls, got {type(unet).__name__}, which is not called "
                "itself"
            )
        if not early:
            return {}
        columns = unet_grid(latents, positions // latents[0], unet)[2]
        return band(columns, latents[-1])

    with ExitStack() as stack:
        stack.enter_context(uncompiled(unet, [unet, *attentions]))
        stack.callback(unet.register_forward_pre_hook(begin_call, with_kwargs=True).remove)
        for attention in attentions:
            before = vars(attention).get("forward")
            if before is None:
                stack.callback(delattr, attention, "forward")
            else:
                stack.callback(setattr, attention, "forward", before)
            attention.forward = partial(_forward, attention, attention.forward, options, backend)
        yield


def _forward(
    attention: Any,  # a class of VideoCrafter
    stock: Callable[..., torch.Tensor],
    options: Callable[[int], dict[str, Any]],
    backend: str,
    x: torch.Tensor,  # [P, F, C]
    context: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    **others: Any,  # VSTAR's own UNet says which step it is
) -> torch.Tensor:
    given = options(x.shape[0]) if context is None else {}
    if not given:
        return stock(x, context=context, mask=mask, **others)
    if mask is not None:
        raise ArgumentError(f"temporal attention with a mask is not supported, got one of shape {tuple(mask.shape)}")
    query, key, value = (
        project(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # [P, heads, F, D]
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    out = temporal_attention(query, key, value, scale=attention.scale, backend=backend, **given).out
    return attention.to_out(out.transpose(1, 2).flatten(-2))
