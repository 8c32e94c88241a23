"""`Model`: what capture and guidance must know of a denoiser class; one entry of the table is one of these."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from cvg_kernels.pipeline.models.by_range import TextRange

Grid = tuple[int, int, int]  # frames, rows, columns
Kind = Literal["cross", "self", "temporal"]
#: Where the text stands among the keys of a layer: they begin with it and hold no video, or both are one sequence.
TextPlace = Literal["alone", "first", "last"]
#: Order of the latents' axes as the denoiser takes them; N: the tokens of all frames, rows and columns.
Axes = Literal["BCFHW", "BFCHW", "BFHWC", "BNC"]
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Layers:
    """Attention layers of one kind.

    Attributes:
        pattern: a regular expression of their names, searched for.
        kind: joint attention of text and video is `"cross"`: there the words are looked at.
        text: where the text stands among their keys.
    """

    pattern: str
    kind: Kind
    text: TextPlace = "alone"


@dataclass(frozen=True)
class TextOrder:
    """Where the tokens of the text that a denoiser is given stand in the text of its layers.

    Attributes:
        places: int64 `[B, L]`; −1 for a token that the layers do not have.
        length: how many tokens the text of the layers has; `None`: all that stand behind the video.
    """

    places: torch.Tensor
    length: int | None


@dataclass(frozen=True)
class Model:
    """What capture and guidance must know of a denoiser class.

    Attributes:
        grid: (latents' shape `[B, C, F, H, W]`, tokens per sample, denoiser) → the grid of an attention layer.
        layers: its attention layers; the first pattern that fits counts, layers that none fits take no part (of a text
            refiner, of audio, of a face).
        latents: name of the forward argument that holds the latents; those of a condition stand behind them.
        axes: the order of their axes.
        sizes: (arguments of a call) → the grid of latents whose axes are `"BNC"`.
        condition_behind: whether tokens of a condition among them stand behind those of the video, not before.
        tiles: (arguments of a call) → n, if the tokens of a frame are in the order of its tiles of n × n, else 1.
        channels_of: where its configuration tells the channels that go in and that come out.
        batched_branches: whether pipelines stack [unconditional, conditional] into one call.
        disturbed: (arguments of a call) → whether the network is disturbed in it for the sake of guidance.
        frames_in_batch: whether cross-attention sees one sample per frame (`[B·F, h·w, C]`), and temporal layers
            relate the frames; if not, self-attention or joint attention spans the video.
        text_per_frame: whether the caller repeats the text for every frame.
        text_order: (arguments of a call) → where the tokens of the text stand in that of the layers, if not where the
            denoiser was given them.
        image_call_first: whether a layer with keys of an image (`add_k_proj`) attends to that first, by a call of its
            own.
        call_per_sample: whether a layer attends once for each sample, without the padding of its text.
        masks_alike: whether a layer's mask, whatever its shape, is the same for all heads and all tokens of the video.
        scaled_by: (arguments of a call, the scheduler's σ) → c, if the pipeline itself scales latents x to c · x for
            the denoiser and makes the noise for its scheduler of c · x and the answer; 1 if it does not.
        prepares: (arguments of a call) → whether it fills a cache only and predicts nothing: such calls take no part.
        given: (arguments of a call, configuration) → where latents are given and not to be moved: 1 there and 0
            elsewhere, broadcast to `[B, 1, F, H, W]`; `None`: nowhere.
        shared: arguments that all samples of a call share, whatever the length of their first dimension.
        whole: an argument that holds all samples of a call in a way that cannot be cut, so that no call is made for
            some.
        leaves_out: (denoiser, name of a layer) → whether it takes no part although a pattern fits.
        image_behind_text: whether keys of an image stand behind the text's in the same call.
        text_projection: name of the module that the text passes before it reaches the layers.
        frame_positions: name of the buffer `[1, F, C]` that is added to the frames before the first temporal layer, in
            a model that has one in its forward (others have modules for it).
        range: what the user says of a denoiser that is not in the table.
        temporal_modules: the names of the modules through which alone its frames see each other, each of which adds to
            what it is given; `None` if there are no such modules.
    """

    grid: Callable[[tuple[int, ...], int, Any], Grid]
    layers: tuple[Layers, ...]
    latents: str = "hidden_states"
    axes: Axes = "BCFHW"
    sizes: Callable[[Arguments], Grid] | None = None
    condition_behind: bool = False
    tiles: Callable[[Arguments], int] | None = None
    channels_of: tuple[str, str] = ("in_channels", "out_channels")
    batched_branches: bool = True
    disturbed: Callable[[Arguments], bool] | None = None
    frames_in_batch: bool = False
    text_per_frame: bool = False
    text_order: Callable[[Arguments], TextOrder] | None = None
    image_call_first: bool = False
    call_per_sample: bool = False
    masks_alike: bool = False
    scaled_by: Callable[[Arguments, float], float] | None = None
    prepares: Callable[[Arguments], bool] | None = None
    given: Callable[[Arguments, Any], torch.Tensor | None] | None = None
    shared: frozenset[str] = frozenset(("image_rotary_emb", "attention_kwargs", "cross_attention_kwargs"))
    whole: str | None = None
    leaves_out: Callable[[nn.Module, str], bool] | None = None
    image_behind_text: bool = False
    text_projection: str | None = None
    frame_positions: str | None = None
    temporal_modules: re.Pattern[str] | None = None
    range: TextRange | None = None

    @property
    def joint(self) -> bool:
        """Whether one attention relates text and video, in one sequence."""
        return any(layers.text != "alone" for layers in self.layers)

    def layers_of(self, denoiser: nn.Module, name: str) -> Layers | None:
        """What an attention layer is, or `None` if it takes no part.

        Args:
            denoiser: the network.
            name: name of the layer.
        """
        if self.leaves_out is not None and self.leaves_out(denoiser, name):
            return None
        return next((one for one in self.layers if re.search(one.pattern, name)), None)

    def per_sample(self, name: str) -> bool:
        """Whether an argument of the forward may hold one entry for every sample (or every frame of one)."""
        return name not in self.shared

    def channels(self, config: Any) -> int:
        """How many of the channels that the denoiser is given are latents.

        Args:
            config: config of the denoiser.
        """
        given, predicted = (config.get(name) for name in self.channels_of)
        return min(given, predicted or given)

    def text(self, arguments: Arguments) -> torch.Tensor:
        """What a denoiser is given of the text, `[B, …, tokens, C]`.

        Args:
            arguments: arguments of the call, by name.
        """
        text = arguments.get("encoder_hidden_states")
        if text is None:
            raise ArgumentError("the denoiser must be given its text as encoder_hidden_states")
        return text[0] if isinstance(text, (tuple, list)) else text  # beside an image's

    def named(self, arguments: Arguments, config: Any) -> torch.Tensor:
        """The latents of a call with their axes as `[B, C, F, H, W]`, without those of a condition.

        Args:
            arguments: arguments of the call, by name.
            config: config of the denoiser.
        """
        latents = arguments[self.latents]
        if self.range is not None:  # whatever its axes
            return latents
        if self.axes == "BNC":
            grid = self.sizes(arguments)
            tokens = math.prod(grid)
            begin = 0 if self.condition_behind else latents.shape[1] - tokens
            latents = latents[:, begin : begin + tokens].unflatten(1, grid).movedim(-1, 1)
        elif self.axes == "BFCHW":
            latents = latents.transpose(1, 2)
        elif self.axes == "BFHWC":
            latents = latents.movedim(-1, 1)
        return latents[:, : self.channels(config)]

    def native(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[B, C, F, H, W]` with their axes as the denoiser takes them."""
        if self.axes == "BNC":
            return latents.movedim(1, -1).flatten(1, 3)
        if self.axes == "BFCHW":
            return latents.transpose(1, 2)
        return latents.movedim(1, -1) if self.axes == "BFHWC" else latents

    def with_latents(self, arguments: Arguments, latents: torch.Tensor) -> torch.Tensor:
        """What a denoiser is given in the place of its latents; what is given beside them stays.

        Args:
            arguments: arguments of the call, by name.
            latents: others, `[B, C, F, H, W]`.
        """
        given = arguments[self.latents]
        latents_native = self.native(latents).to(given.dtype)
        axis = 1 if self.axes == "BNC" else self.axes.index("C")
        own, total = latents_native.shape[axis], given.shape[axis]
        if own == total:  # with the strides that it has: others are rounded otherwise
            return latents_native
        if self.axes == "BNC" and not self.condition_behind:
            return torch.cat([given.narrow(axis, 0, total - own), latents_native], dim=axis)
        return torch.cat([latents_native, given.narrow(axis, own, total - own)], dim=axis)
