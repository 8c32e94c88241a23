"""`Geometry`: how the tokens of a denoiser call lie over the video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from cvg_kernels.pipeline.models import Grid, Model, model_of, unwrap

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
    """

    model: Model
    denoiser: nn.Module
    latents: tuple[int, ...]
    text_length: int
    disturbed: int = 0

    @classmethod
    def of(cls, denoiser: nn.Module, arguments: dict[str, Any]) -> Geometry:
        """The geometry of a call.

        Args:
            denoiser: the network.
            arguments: of the call, by name.
        """
        model, network = model_of(denoiser), unwrap(denoiser)
        latents = model.named(arguments[model.latents])[:, : model.channels(network)]
        return cls(
            model, network, tuple(latents.shape), arguments["encoder_hidden_states"].shape[1]
        )

    def samples(self, disturbs: bool) -> int:
        """How many samples a layer sees.

        Args:
            disturbs: whether PAG disturbs the layer.
        """
        return self.latents[0] - (self.disturbed if disturbs else 0)

    def grid(self, tokens: int) -> Grid:
        """The grid of a layer that has so many tokens per sample (or per frame)."""
        return self.model.grid(self.latents, tokens, self.denoiser)
