"""Which attention is which: the layers of a denoiser and their kinds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.models import Kind, TextPlace, TextRange, known_model, model_of, unwrap


@dataclass(frozen=True)
class Layer:
    """One attention layer of a denoiser.

    Attributes:
        name: dotted path of the module.
        module: the attention.
        kind: joint attention of text and video is cross: there the words are looked at.
        text: where the text stands among its keys.
        text_call: which of its calls of attention has the text among the keys, 0 first; `None`: each, one for a
            sample.
        masks_alike: whether its mask, whatever its shape, is the same for all heads and all tokens of the video.
        range: what the user says of the layers of a denoiser that is not in the table.
    """

    name: str
    module: nn.Module
    kind: Kind
    text: TextPlace = "alone"
    text_call: int | None = 0
    masks_alike: bool = False
    range: TextRange | None = None

    @property
    def heads(self) -> int:
        """How many heads it has."""
        return self.module.heads if hasattr(self.module, "heads") else self.module.num_heads


#: The layers of frames alone, in denoisers that are not in the table.
_TEMPORAL = re.compile(r"motion_modules|temp_attentions|transformer_in|temporal_transformer_blocks")
#: Where a cross-attention layer stands → the names of the temporal layers behind it.
_TEMPORAL_AFTER_CROSS = (
    (re.compile(r"(.*\.)attentions\.(\d+)\."), r"{}(motion_modules|temp_attentions)\.{}\."),
    (re.compile(r"()transformer_blocks\.(\d+)\."), r"{}temporal_transformer_blocks\.{}\."),
)


def attention_layers(denoiser: nn.Module) -> list[Layer]:
    """Lists all attention layers of a denoiser, classified; of one that is not in `MODELS` too.

    Those that the entry of the denoiser leaves out are not among them.
    """
    denoiser = unwrap(denoiser)
    model = known_model(denoiser)
    found = []
    for path, module in denoiser.named_modules():
        if not hasattr(module, "processor"):
            continue
        name = _plain(path)
        if model is None:
            found.append(Layer(name, module, _kind(name, module)))
        elif (what := model.layers_of(denoiser, name)) is not None:
            call: int | None = 0
            if what.kind == "cross" and model.call_per_sample:
                call = None
            elif what.kind == "cross" and model.image_call_first:
                call = int(getattr(module, "add_k_proj", None) is not None)
            alike = model.masks_alike
            found.append(Layer(name, module, what.kind, what.text, call, alike, model.range))
    return found


def _plain(name: str) -> str:
    """A module's path without the wrappers of `torch.compile`."""
    return name.replace("_orig_mod.", "")


def _kind(name: str, module: nn.Module) -> Kind:
    if _TEMPORAL.search(name):
        return "temporal"
    return "cross" if getattr(module, "is_cross_attention", False) else "self"


def give_processor(module: nn.Module, processor: object) -> None:
    """Gives an attention another processor; some modules have no method for it.

    Args:
        module: the attention.
        processor: that it calls from now on.
    """
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def frame_layers(denoiser: nn.Module) -> list[Layer]:
    """The layers in which frames attend to each other: the temporal ones, or those whose attention spans the video."""
    over_frames = model_of(denoiser).frames_in_batch

    def relates(layer: Layer) -> bool:
        if over_frames:
            return layer.kind == "temporal"
        return layer.kind == "self" or layer.text != "alone"

    return [layer for layer in attention_layers(denoiser) if relates(layer)]


def frame_maps(denoiser: nn.Module) -> dict[str, Layer]:
    """The temporal maps that a denoiser has: name → the layer that makes them.

    Those of a temporal layer have its name. A layer whose attention spans the video may have maps of words as well:
    its temporal ones are called `<layer>:frames`.
    """
    return {
        layer.name if layer.kind == "temporal" else f"{layer.name}:frames": layer for layer in frame_layers(denoiser)
    }


def temporal_partners(layers: list[Layer], cross: Layer) -> list[Layer]:
    """The temporal layers that follow a cross-attention layer in its block, in the order in which they run."""
    partners = []
    for pattern, names in _TEMPORAL_AFTER_CROSS:
        if place := pattern.match(cross.name):
            behind = re.compile(names.format(*map(re.escape, place.groups())))
            partners += [one for one in layers if one.kind == "temporal" and behind.match(one.name)]
    return sorted(partners, key=lambda layer: layer.name)


#: A layer of a stack of blocks.
_IN_BLOCK = re.compile(r"(?P<stack>(?:.*\.)?\w*blocks\.)(?P<number>\d+)\.")


def following_frames(maps: dict[str, Layer], cross: Layer) -> list[str]:
    """The temporal maps through which goes what a text layer has written: of the attention in the next block.

    Args:
        maps: as `frame_maps` has them, of a denoiser whose attention spans the video.
        cross: a text layer, or one of text and video.
    """
    place = _IN_BLOCK.match(cross.name)
    if place is None:
        return []
    stack, number = place["stack"], int(place["number"])
    following = [name for name in maps if name.startswith(f"{stack}{number + 1}.")]
    if not following and stack == "transformer_blocks.":  # the first of the blocks in one stream
        following = [name for name in maps if name.startswith("single_transformer_blocks.0.")]
    return following


def spatial_partner(layers: list[Layer], cross: Layer) -> Layer | None:
    """The attention among the positions of a frame that stands in the same transformer block as a cross-attention
    layer.
    """
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
            "FreeNoise's split inference hands the layers parts of a video, whose maps and texts cannot be put "
            "together: do without enable_free_noise_split_inference()"
        )
