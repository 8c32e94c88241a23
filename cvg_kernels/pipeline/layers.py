"""Which attention is which: the layers of a denoiser and their kinds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.models import MODELS, model_of, unwrap

Kind = Literal["cross", "self", "temporal"]


@dataclass(frozen=True)
class Layer:
    """One attention layer of a denoiser."""

    name: str  #: dotted path of the module
    module: nn.Module
    kind: Kind  #: joint attention of text and video is cross: there the words are looked at


_TEMPORAL = re.compile(r"motion_modules|temp_attentions|transformer_in|temporal_transformer_blocks")
#: Where a cross-attention layer stands → the names of the temporal layers behind it.
_TEMPORAL_AFTER_CROSS = (
    (re.compile(r"(.*\.)attentions\.(\d+)\."), r"{}(motion_modules|temp_attentions)\.{}\."),
    (re.compile(r"()transformer_blocks\.(\d+)\."), r"{}temporal_transformer_blocks\.{}\."),
)


def attention_layers(denoiser: nn.Module) -> list[Layer]:
    """Lists all attention layers of a denoiser, classified; of one that is not in `MODELS` too."""
    denoiser = unwrap(denoiser)
    joint = any(
        base.__name__ in MODELS and MODELS[base.__name__].joint for base in type(denoiser).__mro__
    )
    return [
        Layer(_plain(name), module, "cross" if joint else _kind(name, module))
        for name, module in denoiser.named_modules()
        if hasattr(module, "set_processor") and hasattr(module, "processor")
    ]


def _plain(name: str) -> str:
    """A module's path without the wrappers of `torch.compile`."""
    return name.replace("_orig_mod.", "")


def _kind(name: str, module: nn.Module) -> Kind:
    if _TEMPORAL.search(name):
        return "temporal"
    return "cross" if getattr(module, "is_cross_attention", False) else "self"


def frame_layers(denoiser: nn.Module) -> list[Layer]:
    """The layers in which frames attend to each other: the temporal ones, or those whose attention spans the video."""
    model = model_of(denoiser)
    kind = "temporal" if model.frames_in_batch else "cross" if model.joint else "self"
    return [layer for layer in attention_layers(denoiser) if layer.kind == kind]


def temporal_partners(layers: list[Layer], cross: Layer) -> list[Layer]:
    """The temporal layers that follow a cross-attention layer in its block, in the order in which they run."""
    partners = []
    for pattern, names in _TEMPORAL_AFTER_CROSS:
        if place := pattern.match(cross.name):
            behind = re.compile(names.format(*map(re.escape, place.groups())))
            partners += [one for one in layers if one.kind == "temporal" and behind.match(one.name)]
    return sorted(partners, key=lambda layer: layer.name)


def spatial_partner(layers: list[Layer], cross: Layer) -> Layer | None:
    """The attention among the positions of a frame that stands in the same transformer block as a cross-attention layer."""
    name = re.sub(r"attn2$", "attn1", cross.name)
    return next((layer for layer in layers if layer.kind == "self" and layer.name == name), None)


def check_undivided(denoiser: nn.Module) -> None:
    """Checks that a layer sees a frame at once, as under FreeNoise's split inference it does not.

    Args:
        denoiser: the network.

    Raises:
        ArgumentError: if it sees a part only.
    """
    if any(type(module).__name__ == "SplitInferenceModule" for module in denoiser.modules()):
        raise ArgumentError(
            "FreeNoise's split inference hands the layers parts of a video, whose maps and texts cannot be put together: "
            "do without enable_free_noise_split_inference()"
        )
