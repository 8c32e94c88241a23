"""The temporal layers of a denoiser, and the image model that it is without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cvg_kernels.blocks import block
from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.exchange import replaced_forwards
from cvg_kernels.pipeline.models import MODELS, model_of, unwrap


def temporal_modules(denoiser: nn.Module) -> list[nn.Module]:
    """Lists the modules through which alone the frames of a denoiser see each other.

    Raises:
        ArgumentError: for a class that has no such modules, or is not known.
    """
    names = model_of(denoiser).temporal_modules
    if names is None:
        accepted = ", ".join(kind for kind, model in MODELS.items() if model.temporal_modules)
        raise ArgumentError(
            f"denoiser must have temporal layers of its own ({accepted}), got {type(unwrap(denoiser)).__name__}"
        )
    return [m for name, m in unwrap(denoiser).named_modules() if names.search(name)]


@block
def temporal_layers_off(denoiser: nn.Module) -> Iterator[None]:
    """Makes a video model an image model: inside the block its temporal layers give back what they get.

    Args:
        denoiser: one of a class with temporal layers of its own: `UNetMotionModel` or `UNet3DConditionModel`.

    Raises:
        ArgumentError: for another class.
    """

    def identity(hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        # Transformers are asked for a tuple, motion modules and convolutions for a tensor.
        return (hidden_states,) if kwargs.get("return_dict") is False else hidden_states

    with replaced_forwards(dict.fromkeys(temporal_modules(denoiser), identity)):
        yield
