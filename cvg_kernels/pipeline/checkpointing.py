"""Gradient checkpointing of a denoiser while a method differentiates through it: less memory for one more forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.models import unwrap

_SET = ("gradient_checkpointing", "_gradient_checkpointing_func")


def check_checkpointing(denoiser: nn.Module) -> None:
    """Checks that a denoiser can compute its blocks again in the backward pass.

    Raises:
        ArgumentError: if diffusers does not offer it.
    """
    network = unwrap(denoiser)
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ArgumentError(
            f"checkpointing=True needs a denoiser with gradient checkpointing, which {type(network).__name__} has not"
        )


@contextmanager
def checkpointed(denoiser: nn.Module) -> Iterator[None]:
    """Computes the blocks of a denoiser again in backward passes within a `with` block, instead of keeping all they
    save.

    As diffusers' `enable_gradient_checkpointing`, which stays as it is where somebody has called it.

    Args:
        denoiser: the network.
    """
    network = unwrap(denoiser)
    if network.is_gradient_checkpointing:
        yield
        return
    before = [
        (module, {name: vars(module)[name] for name in _SET if name in vars(module)})
        for module in network.modules()
        if hasattr(module, _SET[0])
    ]
    try:
        network.enable_gradient_checkpointing()
        yield
    finally:
        for module, own in before:
            for name in _SET:
                vars(module).pop(name, None)
            vars(module).update(own)
