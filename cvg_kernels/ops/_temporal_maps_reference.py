"""The reference as a backend: the closed-form gradient stands in where autograd is below the operation."""

from __future__ import annotations

import torch

from cvg_kernels.ops._autocast import autocast_off
from cvg_kernels.ops._temporal_maps_call import MapsCall, Targets
from cvg_kernels.reference import temporal_maps as reference


def maps_of(call: MapsCall, pair_bias: torch.Tensor | None = None) -> torch.Tensor:
    """The maps by plain PyTorch, which can be differentiated.

    Args:
        call: the arguments.
        pair_bias: instead of the bias of keys, one of pairs of frames, `[B, P, H, F, F]` or what broadcasts to it.
    """
    bias = _bias(call) if pair_bias is None else pair_bias
    with autocast_off(call.query.device):
        return reference.temporal_maps(
            call.query, call.key, call.lse, bias, scale=call.scale, head_mean=call.head_mean
        )


def forward(call: MapsCall) -> torch.Tensor:
    """Returns the maps."""
    return maps_of(call).contiguous()


def backward(call: MapsCall, grad_maps: torch.Tensor, targets: Targets) -> None:
    """Fills the gradients that are wanted."""
    with autocast_off(call.query.device):
        found = reference.temporal_maps_backward(
            grad_maps, call.query, call.key, call.lse, _bias(call), scale=call.scale, head_mean=call.head_mean
        )
    for target, grad in zip(targets, found, strict=True):
        if target is not None:
            target.copy_(grad)


def _bias(call: MapsCall) -> torch.Tensor | None:
    return None if call.key_bias is None else call.key_bias[:, :, None, None]
