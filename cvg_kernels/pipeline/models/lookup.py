"""The denoisers of a pipeline, and their entries in the table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.models.model import Model
from cvg_kernels.pipeline.models.table import LEFT_OUT, MODELS
from cvg_kernels.pipeline.signatures import named_arguments
from cvg_kernels.pipeline.video_pipeline import VideoPipeline

_SLOT = "_cvg_model"  # of a network whose entry a user has named


def unwrap(denoiser: nn.Module) -> nn.Module:
    """The network behind the wrappers of `torch.compile`, PEFT and data parallelism."""
    while True:
        if hasattr(denoiser, "_orig_mod"):
            denoiser = denoiser._orig_mod
        elif hasattr(denoiser, "get_base_model"):
            denoiser = denoiser.get_base_model()
        elif isinstance(getattr(denoiser, "module", None), nn.Module):
            denoiser = denoiser.module
        else:
            return denoiser


def known_model(denoiser: nn.Module) -> Model | None:
    """The entry of a denoiser: one named for it, or that of its class or the nearest it derives from; else `None`."""
    network = unwrap(denoiser)
    if _SLOT in vars(network):
        return vars(network)[_SLOT]
    return next((MODELS[base.__name__] for base in type(network).__mro__ if base.__name__ in MODELS), None)


def model_of(denoiser: nn.Module) -> Model:
    """The entry of a denoiser, as `known_model` finds it.

    Raises:
        ArgumentError: for a class that is not in `MODELS`.
    """
    found = known_model(denoiser)
    if found is not None:
        return found
    kind = type(unwrap(denoiser))
    why = next((LEFT_OUT[base.__name__] for base in kind.__mro__ if base.__name__ in LEFT_OUT), "")
    raise ArgumentError(
        f"denoiser must be one of {', '.join(MODELS)}, got {kind.__name__}{why and f': {why}'}; for others capture "
        "must be told which keys are the text's in its layers, and how the video's tokens lie: text=slice(…), "
        "grid=(F, h, w)"
    )


@contextmanager
def named_model(denoiser: nn.Module, model: Model) -> Iterator[None]:
    """Gives a denoiser an entry for the length of a `with` block.

    Args:
        denoiser: the network.
        model: its entry.
    """
    held = vars(unwrap(denoiser))
    before = held.get(_SLOT)
    held[_SLOT] = model
    try:
        yield
    finally:
        if before is None:
            held.pop(_SLOT, None)
        else:
            held[_SLOT] = before


def denoisers_of(pipe: VideoPipeline | nn.Module) -> list[nn.Module]:
    """The denoisers of a pipeline (Wan 2.2 has two), or the denoiser itself if given one."""
    if isinstance(pipe, nn.Module):
        return [pipe]
    found = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    found = [denoiser for denoiser in found if denoiser is not None]
    if not found:
        raise ArgumentError(f"pipe must have a unet or a transformer, got {type(pipe).__name__} without either")
    return found


def arguments_of(denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a denoiser call by name."""
    kind = type(unwrap(denoiser))
    return named_arguments(kind, "forward", model_of(denoiser).latents, args, kwargs)
