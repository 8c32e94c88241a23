"""VSTAR: longer, livelier video from a short-video model, without training and without gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvg_kernels.capture.layers import (
    Layer,
    attention_layers,
    denoisers_of,
    frame_layers,
    model_of,
    unwrap,
)
from cvg_kernels.capture.processors import InterceptingProcessor, installed, refuse_compiled
from cvg_kernels.capture.prompts import PromptWatch
from cvg_kernels.capture.temporal import temporal_layer, token_frames, video_layer
from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance import videocrafter
from cvg_kernels.guidance.attach import Run
from cvg_kernels.guidance.synopsis import (
    Writer,
    checked_states,
    frame_texts,
    interpolate_states,
    place_texts,
    read_states,
    split_at_then,
)

_INPUT_LAYER = "transformer_in"  # the released code leaves a network's first temporal layer alone


@dataclass(frozen=True)
class VSTAR:
    """VSTAR's generative temporal nursing; attach it to a pipeline as a context manager.

        with cvg.VSTAR(sigma={64: 1.0, 32: 8.0}, prompts=["a bud", "a flower in bloom"]).attach(pipe):
            frames = pipe("a flower opens", num_frames=32).frames[0]

    Temporal attention regularisation: in the first denoising steps the logits of the temporal layers of
    some resolutions get a band, S' = S + strength · max_j S_ij · exp(−(i − j)² / 2σ²) (`temporal_attention`), so that
    their maps look like those of lively video. Wan and CogVideoX have no temporal layers: there the band, by the distance
    of frames, is on the attention over the whole video (`frame_band_attention`), an extension of ours; CogVideoX's text
    tokens, which take part in that attention, get none. Synopsis prompting: several prompts, the states of the video in
    order, give every frame a text of its own between them. And, because a network with absolute frame positions
    (AnimateDiff) makes noise of positions that it never saw, `trained_frames` squeezes a longer clip into those it knows;
    VSTAR's own network needs none of that. Each works without the others.

    Attributes:
        sigma: width of the band in frames (of the latents), by the width of a layer's grid (its number of columns): the
            paper's levels are 64, 32, 16 and 8, for latents 64 wide. One number serves all layers. `"auto"` is the released
            {finest: 1.0, next: 8.0} for latents of any width; Wan and CogVideoX have one level only, their finest. `None`
            regularises nothing. Smaller is stronger.
        strength: factor of the band (1 in the released code); 0 leaves the network as it is.
        until: share of the denoising steps that are regularised, from the first (released: 14 of 25).
        prompts: states in order: a list, a file (a JSON list, or one a line), `"then"` for the parts of the prompt between
            its "then"s, or another writer, which makes them from the prompt (see `guidance.synopsis`). `None`: no synopsis.
            Words that are captured meanwhile are places in the text: each frame shows what its own state has there.
        hold: how often each state stands in the row; more than once, frames stay with it before they go on to the next.
        trained_frames: how many frames the network was trained on: in a longer clip of F frames, frame f takes the
            position f · (trained_frames − 1) / (F − 1), between two that it knows. `None` leaves positions alone (Latte
            then makes clips of that one length only).
        backend: of `temporal_attention` or `frame_band_attention`.

    "VSTAR: Generative Temporal Nursing for Longer Dynamic Video Synthesis" (2024). AnimateDiff, ModelScope, Latte,
    Wan and CogVideoX pipelines; the last two take the band alone, as neither attends to text frame by frame, or adds
    positions to the frames apart from those of rows and columns.
    """

    sigma: Mapping[int, float] | float | str | None = "auto"
    strength: float = 1.0
    until: float = 0.56
    prompts: Sequence[str] | str | Path | Writer | None = None
    hold: int = 1
    trained_frames: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        widths = self.sigma if isinstance(self.sigma, Mapping) else {}
        numbers = list(widths.values()) or (
            [] if self.sigma in ("auto", None) or widths else [self.sigma]
        )
        good = all(isinstance(one, (int, float)) and one > 0 for one in numbers)
        if not good or (isinstance(self.sigma, Mapping) and not widths):
            raise ArgumentError(
                "sigma must be positive, {grid width: positive, …}, 'auto' or None, got "
                f"{self.sigma!r}"
            )
        if not 0 <= self.until <= 1:
            raise ArgumentError(f"until must lie in [0, 1], got {self.until!r}")
        if self.trained_frames is not None and self.trained_frames < 2:
            raise ArgumentError(f"trained_frames must be at least 2, got {self.trained_frames!r}")
        if not (isinstance(self.hold, int) and self.hold >= 1):
            raise ArgumentError(f"hold must be a whole number of at least 1, got {self.hold!r}")
        if self.prompts is not None and self.prompts != "then" and not callable(self.prompts):
            self.states("")

    def states(self, prompt: str) -> list[str] | None:
        """The states of a prompt, or `None` without synopsis.

        Raises:
            ArgumentError: if there is none.
        """
        if self.prompts is None:
            return None
        given = split_at_then if self.prompts == "then" else self.prompts
        if isinstance(given, (str, Path)):
            states = read_states(given)
        elif callable(given):
            states = checked_states(given(prompt), "the writer")
        else:
            states = checked_states(given, "prompts")
        return [state for state in states for _ in range(self.hold)]

    def band(self, columns: int, finest: int) -> dict[str, Any]:
        """The options of `temporal_attention` or `frame_band_attention` for a layer; none: it is not regularised.

        Args:
            columns: of the layer's grid.
            finest: columns of the network's finest grid.
        """
        sigma = self.sigma
        if sigma == "auto":
            sigma = {finest: 1.0, -(-finest // 2): 8.0}
        if isinstance(sigma, Mapping):
            sigma = sigma.get(columns)
        if sigma is None or self.strength == 0:
            return {}
        return {"sigma": float(sigma), "strength": self.strength}

    def attach(self, pipe: Any, prompt: str | list[str] | None = None) -> Nursing:
        """Connects to a pipeline; a context manager.

        Args:
            pipe: a diffusers pipeline (AnimateDiff, ModelScope, Latte, Wan, CogVideoX).
            prompt: says what the prompt is if the pipeline is called with `prompt_embeds`.

        Raises:
            ArgumentError: for an unknown denoiser, or Wan or CogVideoX with `prompts` or `trained_frames`.
        """
        return Nursing(self, pipe, prompt)

    def attach_videocrafter(
        self, unet: nn.Module, *, train_steps: int = 1000
    ) -> AbstractContextManager[None]:
        """Puts the band on the UNet of VideoCrafter's own code (lvdm); a context manager.

            unet = model.model.diffusion_model
            with cvg.VSTAR(sigma={64: 1.0, 32: 8.0}).attach_videocrafter(unet):
                samples, _ = DDIMSampler(model).sample(S=25, …)

        Its samplers are not watched, so `until` is here a share of the timesteps that the network was trained on: the
        same steps for a sampler that goes down them evenly, as VideoCrafter's does.

        Args:
            unet: a module with `TemporalTransformer`s, called as `unet(latents [B, C, F, H, W], timesteps, …)`.
            train_steps: how many timesteps the network was trained on.

        Raises:
            ArgumentError: for a network without such temporal attention or with relative positions in it, a compiled
                one, or settings beyond the band (prompts, trained_frames).
        """
        if self.prompts is not None or self.trained_frames is not None:
            raise ArgumentError(
                "prompts and trained_frames need a diffusers pipeline; on VideoCrafter's UNet they must be None, got "
                f"{self.prompts!r} and {self.trained_frames!r}"
            )
        return videocrafter.regularised(unet, self.band, self.until, train_steps, self.backend)


def frame_positions(denoiser: nn.Module) -> list[nn.Module]:
    """The modules that add a position to each frame before temporal attention: tables `pe` of shape `[1, F, C]`."""
    from diffusers.models.embeddings import SinusoidalPositionalEmbedding

    return [one for one in denoiser.modules() if isinstance(one, SinusoidalPositionalEmbedding)]


@dataclass(frozen=True)
class _Call:
    """A call of the denoiser."""

    latents: tuple[int, ...]  # [B, C, F, H, W]
    regularised: bool
    branches: list[str]  # of each sample


class Nursing:
    """`VSTAR` on a pipeline for the length of a `with` block.

    Args:
        settings: what to do.
        pipe: the pipeline.
        prompt: as for `VSTAR.attach`.
    """

    def __init__(self, settings: VSTAR, pipe: Any, prompt: str | list[str] | None) -> None:
        self._settings = settings
        self._pipe = pipe
        for denoiser in denoisers_of(pipe):
            refuse_compiled(denoiser)
            if model_of(denoiser).frames_in_batch:
                continue
            for name in ("prompts", "trained_frames"):
                if getattr(settings, name) is not None:
                    raise ArgumentError(
                        f"{name} must be None for {type(unwrap(denoiser)).__name__}, which takes the band alone"
                    )
        self._watch = PromptWatch(pipe, prompt)
        self._texts: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each sample: `frame_texts`
        self._texts_run = 0
        self._tables: dict[nn.Module, torch.Tensor] = {}  # denoiser → its frame positions [1, F, C]
        self._calls: list[_Call] = []  # innermost last: a guidance method calls within a call

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            stack.enter_context(self._watch)
            for denoiser in denoisers_of(self._pipe):
                begin = denoiser.register_forward_pre_hook(self._begin_call, with_kwargs=True)
                end = denoiser.register_forward_hook(self._end_call, always_call=True)
                stack.callback(begin.remove)
                stack.callback(end.remove)
                if self._settings.trained_frames is not None:
                    for module in frame_positions(denoiser):
                        stack.callback(module.register_forward_hook(self._squeeze).remove)
                    name = model_of(denoiser).frame_positions
                    if name is not None:
                        table = getattr(denoiser, name)
                        self._tables[denoiser] = table
                        stack.callback(self._set_table, denoiser, name, table)
                if self._settings.prompts is not None:
                    for layer in attention_layers(denoiser):
                        if layer.kind == "cross":
                            hook = layer.module.register_forward_pre_hook(
                                self._give_text, with_kwargs=True
                            )
                            stack.callback(hook.remove)
            processors = {
                layer.module: self._processor(denoiser, layer)
                for denoiser in denoisers_of(self._pipe)
                for layer in frame_layers(denoiser)
                if _INPUT_LAYER not in layer.name
            }
            stack.enter_context(installed(processors))
            self._stack = stack.pop_all()
        return Run()

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _begin_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Sees which step a call belongs to, how large its latents are, and what its samples are."""
        model = model_of(denoiser)
        latents = model.latents_of(args, kwargs)
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timesteps = [float(at) for at in self._pipe.scheduler.timesteps]
        # Wan 2.2 may give every token its own: 0 in a first frame that is given.
        now = float(torch.as_tensor(timestep).max())
        steps = math.ceil(self._settings.until * len(timesteps))
        text = kwargs["encoder_hidden_states"]
        branches = self._watch.branches(latents.shape[0], text, model.batched_branches)
        self._calls.append(_Call(tuple(latents.shape), now in timesteps[:steps], branches))
        if self._settings.prompts is not None and self._texts_run != self._watch.runs:
            self._texts = [self._encode(denoiser, one, text) for one in self._watch.prompts()]
            self._texts_run = self._watch.runs
        if denoiser in self._tables:
            known, frames = self._settings.trained_frames, latents.shape[2]
            table = self._tables[denoiser][:, : min(known, frames)]
            if frames > known:
                table = interpolate_states(table[0, :, None], frames).transpose(0, 1)
            self._set_table(denoiser, model.frame_positions, table)

    @staticmethod
    def _set_table(denoiser: nn.Module, name: str, table: torch.Tensor) -> None:
        """In the dtype and on the device of the present one: the pipeline may have been moved meanwhile."""
        setattr(denoiser, name, table.to(getattr(denoiser, name)))

    def _end_call(self, *call: Any) -> None:
        self._last = self._calls.pop()

    @torch.no_grad()
    def _encode(
        self, denoiser: nn.Module, prompt: str, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The text of every frame of a video as its layers are given it, and which tokens a frame has."""
        states = self._watch.encode(self._settings.states(prompt), text.device)
        encoded = [state.to(text.dtype) for state in states]
        texts, there = frame_texts(encoded, self._calls[-1].latents[2])
        projection = model_of(denoiser).text_projection
        return (texts if projection is None else getattr(denoiser, projection)(texts)), there

    def _squeeze(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Adds the positions of a squeezed clip instead of its own."""
        known, (x,) = self._settings.trained_frames, args
        if x.shape[1] <= known:
            return None
        positions = interpolate_states(module.pe[0, :known, None], x.shape[1])  # [F, 1, C]
        return x + positions[:, 0].to(x.dtype)

    def _give_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        """Puts the text of each frame in the place of the prompt's, for the conditional samples of a call."""
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        call = self._calls[-1]
        if text.shape[0] < len(call.branches) * call.latents[2]:
            return None  # the unconditional samples alone: Gen-1's image model, within the call of both
        conditional = [at for at, branch in enumerate(call.branches) if branch == "cond"]
        text, mask = place_texts(text, conditional, self._texts)
        if mask is not None:
            kwargs = {**kwargs, "attention_mask": mask}
        if "encoder_hidden_states" in kwargs:
            return args, {**kwargs, "encoder_hidden_states": text}
        return (args[0], text, *args[2:]), kwargs

    def _call_now(self) -> _Call:
        """The call that a layer runs in.

        A layer replayed by gradient checkpointing runs in no call, or in that around its own: of the same step, and of the
        same size but for the batch.
        """
        return self._calls[-1] if self._calls else self._last

    def _processor(self, denoiser: nn.Module, layer: Layer) -> InterceptingProcessor:
        if layer.kind == "temporal":
            return self._temporal_processor(denoiser, layer)
        return self._video_processor(denoiser, layer)

    def _temporal_processor(self, denoiser: nn.Module, layer: Layer) -> InterceptingProcessor:
        model = model_of(denoiser)
        columns: dict[tuple[int, ...], int] = {}  # (F, H, W) of the latents → of the layer's grid

        def band(query: torch.Tensor) -> dict[str, Any]:
            call = self._call_now()
            if not call.regularised:
                return {}
            size = call.latents[2:]
            if size not in columns:
                each = query.shape[0] // call.latents[0]
                columns[size] = model.grid(call.latents, each, unwrap(denoiser))[2]
            return self._settings.band(columns[size], size[-1])

        def attend(query, key, value, mask, scale):
            options = band(query)
            if not options:
                return None  # torch's own attention
            return temporal_layer(query, key, value, mask, scale, options, self._settings.backend)[
                0
            ]

        return InterceptingProcessor.wrap(layer.module.processor, layer.name, attend, band)

    def _video_processor(self, denoiser: nn.Module, layer: Layer) -> InterceptingProcessor:
        model = model_of(denoiser)

        def band(query: torch.Tensor) -> dict[str, Any]:
            call, tokens = self._call_now(), query.shape[2]
            grid = model.grid(call.latents, tokens, unwrap(denoiser))
            options = self._settings.band(grid[2], grid[2]) if call.regularised else {}
            if options:
                options["frames"] = token_frames(grid, tokens, query.device)
            return options

        def attend(query, key, value, mask, scale):
            options = band(query)
            if not options:
                return None
            backend = self._settings.backend
            return video_layer(query, key, value, mask, scale, backend, **options).out

        return InterceptingProcessor.wrap(layer.module.processor, layer.name, attend, band)
