"""`Call`: one call of the denoiser, decoded once, in the terms that every method speaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.geometry import Branch, Geometry
from cvg_kernels.pipeline.models import Model, model_of, unwrap
from cvg_kernels.pipeline.sampling import Sampling
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.tokens import EncodedText, TokenSpan, Word


class Caller(Protocol):
    """Calls the denoiser for a method; see `PipelineHooks`."""

    def predict(self, call: Call, latents: torch.Tensor | None = None) -> Any:
        """Calls the denoiser with a call's arguments, or with other latents."""


@dataclass(frozen=True)
class Call:
    """One call of the denoiser.

    Attributes:
        pipe: the pipeline that is running.
        denoiser: the network, or what is compiled around it.
        arguments: arguments of the call, by name.
        latents: `[B, C, F, H, W]`, without the channels of a condition. For `Guidance.before_step` they are in float32
            (float64 for float64) and as the scheduler has them, else as the denoiser is given them.
        branches: branches of each sample.
        index: number of the denoising step among those that this run makes, 0 first.
        count: how many steps the run makes.
        timestep: timestep of the noisy tokens, where a call carries one per token.
        leading: whether a move of the latents takes effect at this call: it begins a step of the scheduler.
        sampling: the run that the call belongs to; what is remembered of one run is not used in another.
        hooks: through which a method calls the denoiser.
        own: whether a method is calling, so that this is no prediction of the pipeline.
        scale: the factor by which the denoiser's input differs from `latents`.
        section: number of the section of a long video that the run makes, or of a round through the schedule, 0 first.
    """

    pipe: VideoPipeline
    denoiser: nn.Module
    arguments: dict[str, Any]
    latents: torch.Tensor
    branches: tuple[Branch, ...]
    index: int
    count: int
    timestep: float
    leading: bool
    sampling: Sampling
    hooks: Caller
    own: bool = False
    scale: float = 1.0
    section: int = 0

    @property
    def model(self) -> Model:
        """Table entry of the denoiser."""
        return model_of(self.denoiser)

    @cached_property
    def geometry(self) -> Geometry:
        """How the tokens of the call lie."""
        geometry = Geometry.of(self.denoiser, self.arguments)
        return replace(geometry, disturbed=self.branches.count("perturbed"))

    @property
    def text(self) -> torch.Tensor:
        """What the denoiser is given of the text, `[B, tokens, C]` or `[B·F, tokens, C]`."""
        return self.model.text(self.arguments)

    @property
    def texts(self) -> list[EncodedText]:
        """The prompt of each video as the text encoder read it."""
        return self.sampling.texts()

    @property
    def prompts(self) -> list[str]:
        """The prompt of each video."""
        return [text.text for text in self.texts]

    def find(self, words: Sequence[Sequence[Word]]) -> list[list[TokenSpan]]:
        """Finds words in the prompt of each video.

        Args:
            words: for each video.

        Raises:
            ArgumentError: for a word that is not there.
        """
        if all(isinstance(word, TokenSpan) for each in words for word in each):
            return [list(each) for each in words]  # the texts need not be known
        return [
            text.find(each, convert=self.sampling.prompt.convert) for text, each in zip(self.texts, words, strict=True)
        ]

    def denoise(self, latents: torch.Tensor) -> Any:
        """Calls the denoiser for a method: no prediction of the pipeline, and not recorded.

        Args:
            latents: `[B, C, F, H, W]`, of the kind of `self.latents`.
        """
        return self.hooks.predict(self, latents if self.scale == 1 else latents * self.scale)

    def samples(self, *branches: Branch) -> slice:
        """Where the samples of some branches stand in the batch; they are neighbours.

        Args:
            *branches: which.
        """
        places = [place for place, branch in enumerate(self.branches) if branch in branches]
        return slice(places[0], places[-1] + 1) if places else slice(0, 0)

    def part(self, samples: slice) -> Call:
        """The call with some of its samples alone: whatever holds an entry for every sample, or for every frame, is
        cut.

        Args:
            samples: which.

        Raises:
            ArgumentError: if the model has an argument that cannot be cut.
        """
        batch = len(self.branches)
        if samples == slice(0, batch):
            return self
        if self.arguments.get(self.model.whole) is not None:
            raise ArgumentError(
                f"{self.model.whole} of {type(unwrap(self.denoiser)).__name__} holds all branches of guidance in one, "
                "and cannot be cut for a method's own calls: call the pipeline with guidance_scale=1"
            )

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 0 or tensor.shape[0] == 0 or tensor.shape[0] % batch:
                return tensor
            each = tensor.shape[0] // batch
            return tensor[samples.start * each : samples.stop * each]

        arguments = {
            name: tree_map_only(torch.Tensor, cut, value) if self.model.per_sample(name) else value
            for name, value in self.arguments.items()
        }
        return replace(self, arguments=arguments, latents=self.latents[samples], branches=self.branches[samples])

    def with_latents(self, latents: torch.Tensor) -> dict[str, Any]:
        """The arguments of the call with other latents; the channels of a condition stay.

        Args:
            latents: `[B, C, F, H, W]`, as the denoiser is given them.
        """
        model = self.model
        return {**self.arguments, model.latents: model.with_latents(self.arguments, latents)}

    def noisy(self) -> torch.Tensor | None:
        """Where the latents are noisy, bool `[B, 1, F, H, W]`, if a call tells it of parts of them; else `None`.

        Some pipelines give the tokens of a frame that is given the timestep 0, or a mask: those must not be moved.
        """
        model, config = self.model, getattr(unwrap(self.denoiser), "config", None)
        given = None if model.given is None else model.given(self.arguments, config)
        if given is not None:
            return given == 0
        timesteps = self.arguments.get("timestep")
        if not torch.is_tensor(timesteps) or timesteps.ndim < 2 or timesteps[0].numel() < 2:
            return None
        each = timesteps.flatten(1)
        grid = self.geometry.grid(each.shape[1])
        if each.shape[1] in (grid[0], self.latents.shape[2]):
            grid = (each.shape[1], 1, 1)
        size = grid[0] * grid[1] * grid[2]
        if each.shape[1] < size:
            raise ArgumentError(
                f"timestep must have one value a frame or a token of the grid {grid}, got {tuple(timesteps.shape)}"
            )
        own = each[:, :size] if model.condition_behind else each[:, -size:]
        noisy = (own > 0).unflatten(1, grid)
        for axis, full in enumerate(self.latents.shape[2:], start=1):
            noisy = noisy.repeat_interleave(full // noisy.shape[axis], dim=axis)
        return noisy[:, None]


def timestep_of(arguments: dict[str, Any]) -> float:
    """The timestep of the noisy tokens of a call: the largest, where every token has its own.

    Args:
        arguments: arguments of the call, by name.
    """
    return float(torch.as_tensor(arguments["timestep"]).float().max())


def repeated(tensor: torch.Tensor, branches: Sequence[Branch], samples: int) -> torch.Tensor:
    """A tensor `[samples, …]` for every branch of a call, `[B, …]`.

    Args:
        tensor: one entry a video.
        branches: branches of the call.
        samples: videos made at once.
    """
    return tensor.repeat(len(branches) // samples, *[1] * (tensor.ndim - 1))
