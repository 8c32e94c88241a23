"""`Geometry`: how the tokens of a denoiser call lie over the video."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import pad

from cvg_kernels.pipeline.layers import Layer
from cvg_kernels.pipeline.models import Grid, Model, TextOrder, model_of, unwrap

#: What a sample of a call is: with or without the prompt, or with it and disturbed attention (PAG).
Branch = Literal["cond", "uncond", "perturbed"]


@dataclass(frozen=True)
class Geometry:
    """How the tokens of a denoiser call lie: what arranges the maps of its layers over the video.

    Attributes:
        model: table entry of the denoiser.
        denoiser: the network.
        latents: shape `[B, C, F, H, W]` of what it is given, conditions left out.
        text_length: tokens of the text.
        disturbed: how many samples, the last ones, have no attention of their own in the layers that PAG disturbs.
        order: where the tokens of the text stand in that of joint layers, if not where the denoiser was given them.
        tile: side of the tiles in whose order the tokens of a frame are; 1: row by row.
        short: whether more tokens are asked for than the text has.
    """

    model: Model
    denoiser: nn.Module
    latents: tuple[int, ...]
    text_length: int
    disturbed: int = 0
    order: TextOrder | None = None
    tile: int = 1
    short: bool = False

    @classmethod
    def of(cls, denoiser: nn.Module, arguments: dict[str, Any]) -> Geometry:
        """The geometry of a call.

        Args:
            denoiser: the network.
            arguments: arguments of the call, by name.
        """
        model, network = model_of(denoiser), unwrap(denoiser)
        latents = model.named(arguments, getattr(network, "config", None))
        order = None if model.text_order is None else model.text_order(arguments)
        length = model.text(arguments).shape[-2]
        tile = 1 if model.tiles is None else model.tiles(arguments)
        return cls(model, network, tuple(latents.shape), length, order=order, tile=tile)

    def per_frame(self, tokens: int) -> bool:
        """Whether a text layer of so many tokens sees the frames one by one."""
        named = self.model.range
        return self.model.frames_in_batch if named is None else named.per_frame(tokens)

    def samples(self, disturbs: bool) -> int:
        """How many samples a layer sees.

        Args:
            disturbs: whether PAG disturbs the layer.
        """
        return self.latents[0] - (self.disturbed if disturbs else 0)

    def grid(self, tokens: int) -> Grid:
        """The grid of a layer that has so many tokens per sample (or per frame)."""
        return self.model.grid(self.latents, tokens, self.denoiser)

    def reaching(self, tokens: int) -> Geometry:
        """The same call, whose text is asked for so many tokens: those beyond its own are seen by no layer.

        A branch without the prompt may be given a shorter text.

        Args:
            tokens: tokens of a text.
        """
        if tokens <= self.text_length:
            return self
        order = self.order
        if order is not None:
            places = pad(order.places, (0, tokens - self.text_length), value=-1)
            order = replace(order, places=places)
        return replace(self, order=order, short=True)

    def video_begins(self, layer: Layer, tokens: int) -> int:
        """Where the tokens of the video begin among the queries of a layer; they end where its text begins, or at the
        end.

        Args:
            layer: an attention layer over the whole video.
            tokens: that it has.
        """
        video = math.prod(self.grid(tokens))
        if layer.range is not None:
            return layer.range.video_begins(tokens)
        if self.model.condition_behind:
            return 0
        end = self._text_begins(layer, tokens, video) if layer.text == "last" else tokens
        return end - video

    def _text_begins(self, layer: Layer, tokens: int, video: int) -> int:
        """Where the text begins in the keys of a layer."""
        if layer.text != "last":
            return 0
        if self.order is None:
            return tokens - self.text_length
        return video if self.order.length is None else tokens - self.order.length

    def keys(
        self, layer: Layer, tokens: int, ids: torch.Tensor, sample: int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where tokens of the text stand among the keys of a layer.

        Args:
            layer: a text layer.
            tokens: how many keys it has.
            ids: int64 `[B, K]`, positions in the text that the denoiser was given.
            sample: which one alone the layer attends for, or `None` for all.

        Returns:
            Places `[B, K]`, and bool `[B, K]`, which of them are there at all; `None`: all.
        """
        present = ids < self.text_length if self.short else None
        begin, places = 0, ids if present is None else ids.clamp_max(self.text_length - 1)
        if layer.range is not None:
            begin = layer.range.begins(tokens)
        if layer.text == "last":
            begin = self._text_begins(layer, tokens, math.prod(self.grid(tokens)))
        if layer.text != "alone" and self.order is not None:
            places = self.order.places.to(ids.device).gather(1, ids)
            present = places >= 0
            places = places.clamp_min(0)
        if sample is not None:
            places = places[sample : sample + 1]
            present = None if present is None else present[sample : sample + 1]
        return (places + begin if begin else places), present
