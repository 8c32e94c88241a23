"""What a network may be under when something is attached to it: caches, offloading, parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.models import unwrap
from cvg_kernels.pipeline.parallel import check_gradients, check_maps

#: Hooks of diffusers that take a module's weights away after its forward.
_WEIGHT_HOOKS = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")


def check_extra_forwards(denoiser: nn.Module) -> None:
    """Checks that a denoiser can be called between a pipeline's own calls, for maps of a whole video.

    Raises:
        ArgumentError: if a cache is enabled, whose state the extra calls would poison, or it is spread over several
            processes in a way that allows no maps or gradients.
    """
    network = unwrap(denoiser)
    if getattr(network, "is_cache_enabled", False):
        raise ArgumentError(
            "the denoiser has a cache enabled, which the extra forward passes of guidance would poison: call "
            "disable_cache() first"
        )
    check_maps(denoiser)
    check_gradients(denoiser)


def keeps_weights(denoiser: nn.Module) -> bool:
    """Whether the weights that a forward pass used are still there for its backward pass.

    Group offloading and layer-wise casting exchange a module's weights after its forward.
    """
    for module in unwrap(denoiser).modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and any(name in registry.hooks for name in _WEIGHT_HOOKS):
            return False
    return True


@contextmanager
def differentiable(denoiser: nn.Module) -> Iterator[None]:
    """Gradients for latents, not for parameters, whatever mode the pipeline runs in.

    Also where the weights are taken away after a module's forward: those that the backward pass needs are kept till
    then.

    Args:
        denoiser: the network.
    """
    network = unwrap(denoiser)
    trained = [p for p in network.parameters() if p.requires_grad]
    if any(p.is_inference() for p in network.parameters()):
        raise ArgumentError(
            "the denoiser's weights were made under torch.inference_mode, so nothing can be differentiated through "
            "it: load the pipeline outside of it"
        )
    keep = nullcontext()
    if not keeps_weights(denoiser):
        keep = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), lambda kept: kept)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), keep:
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def without_inference_tensors(arguments: Any) -> Any:
    """Copies the tensors of a call that were made in inference mode: those cannot be saved for a backward pass.

    Args:
        arguments: any nested structure.
    """
    with torch.inference_mode(False):  # a copy made within the mode would be of the same kind
        return tree_map_only(
            torch.Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, arguments
        )
