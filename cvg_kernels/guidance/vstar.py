"""VSTAR: longer, livelier video from a short-video model, without training and without gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance import videocrafter
from cvg_kernels.guidance.base import Guidance, check_count, check_number
from cvg_kernels.guidance.frame_texts import FrameTexts
from cvg_kernels.guidance.synopsis import Writer, checked_states, interpolate_states, read_states, split_at_then
from cvg_kernels.pipeline.attention import Attention, token_frames
from cvg_kernels.pipeline.exchange import replaced_forwards
from cvg_kernels.pipeline.layers import Layer, attention_layers, check_undivided, frame_layers
from cvg_kernels.pipeline.models import denoisers_of, model_of, unwrap
from cvg_kernels.pipeline.session import PipelineSession, Run
from cvg_kernels.pipeline.taps import Tap
from cvg_kernels.pipeline.video_pipeline import VideoPipeline

_INPUT_LAYER = "transformer_in"  # the released code leaves a network's first temporal layer alone


@dataclass(frozen=True)
class VSTAR(Guidance):
    """VSTAR's generative temporal nursing; attach it to a pipeline as a context manager.

        with cvg.VSTAR(sigma={64: 1.0, 32: 8.0}, prompts=["a bud", "a flower in bloom"]).attach(pipe):
            frames = pipe("a flower opens", num_frames=32).frames[0]

    Temporal attention regularisation: in the first denoising steps the logits of the temporal layers of
    some resolutions get a band, S' = S + strength · max_j S_ij · exp(−(i − j)² / 2σ²) (`temporal_attention`), so that
    their maps look like those of lively video. Wan and CogVideoX have no temporal layers: there the band, by the
    distance of frames, is on the attention over the whole video (`frame_band_attention`), an extension of ours;
    CogVideoX's text tokens, which take part in that attention, get none. Synopsis prompting: several prompts, the
    states of the video in order, give every frame a text of its own between them. And, because a network with absolute
    frame positions (AnimateDiff) makes noise of positions that it never saw, `trained_frames` squeezes a longer clip
    into those it knows; VSTAR's own network needs none of that. Each works without the others.

    Attributes:
        sigma: width of the band in frames (of the latents), by the width of a layer's grid (its number of columns):
            the paper's levels are 64, 32, 16 and 8, for latents 64 wide. One number serves all layers. `"auto"` is the
            released {finest: 1.0, next: 8.0} for latents of any width; Wan and CogVideoX have one level only, their
            finest. `None` regularises nothing. Smaller is stronger.
        strength: factor of the band (1 in the released code); 0 leaves the network as it is.
        stop: share of the denoising steps that are regularised (released: 14 of 25); a synopsis is for all steps.
        prompts: states in order: a list, a file (a JSON list, or one a line), `"then"` for the parts of the prompt
            between its "then"s, or another writer, which makes them from the prompt (see `guidance.synopsis`). `None`:
            no synopsis. Words that are captured meanwhile are places in the text: each frame shows what its own state
            has there.
        hold: how often each state stands in the row; more than once, frames stay with it before they go on to the
            next.
        trained_frames: how many frames the network was trained on: in a longer clip of F frames, frame f takes the
            position f · (trained_frames − 1) / (F − 1), between two that it knows. `None` leaves positions alone
            (Latte then makes clips of that one length only).
        backend: which implementation of `temporal_attention` or `frame_band_attention` to use.

    "VSTAR: Generative Temporal Nursing for Longer Dynamic Video Synthesis" (2024). AnimateDiff, ModelScope, Latte,
    Wan and CogVideoX pipelines; the last two take the band alone, as neither attends to text frame by frame, or adds
    positions to the frames apart from those of rows and columns.
    """

    sigma: Mapping[int, float] | float | str | None = "auto"
    strength: float = 1.0
    prompts: Sequence[str] | str | Path | Writer | None = None
    hold: int = 1
    trained_frames: int | None = None
    backend: str = "auto"
    stop: float = field(default=0.56, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.sigma if isinstance(self.sigma, Mapping) else {}
        numbers = list(widths.values()) or ([] if self.sigma in ("auto", None) or widths else [self.sigma])
        good = all(
            isinstance(one, (int, float)) and not isinstance(one, bool) and 0 < one < math.inf
            for one in (*widths, *numbers)
        )
        if not good or (isinstance(self.sigma, Mapping) and not widths):
            raise ArgumentError(
                f"sigma must be positive, {{grid width: positive, …}}, 'auto' or None, got {self.sigma!r}"
            )
        check_number("strength", self.strength)
        if self.trained_frames is not None:
            check_count("trained_frames", self.trained_frames, 2)
        check_count("hold", self.hold, 1)
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
            columns: number of columns of the layer's grid.
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

    @property
    def idle(self) -> bool:
        """Whether neither a band nor a synopsis is asked for."""
        no_band = self.sigma is None or self.strength == 0 or super().idle
        return no_band and self.prompts is None

    def why_nothing(self, run: Run) -> str | None:
        """Says that there is one state only, or what widths the layers have, if sigma has none of them."""
        widths = run.notes.get("widths")
        if "one state" in run.notes:
            return "prompts finds one state only, the prompt itself"
        if not widths or not isinstance(self.sigma, Mapping):
            return None
        return f"sigma names the widths {sorted(self.sigma)}, the layers' grids have {sorted(widths)}"

    def check(self, pipe: VideoPipeline) -> None:
        """Checks that the settings are for such a network.

        Raises:
            ArgumentError: for Wan or CogVideoX with `prompts` or `trained_frames`, a network whose layers are given
                parts of a video, or one (Sana) whose frames see each other by no softmax attention.
        """
        for denoiser in denoisers_of(pipe):
            check_undivided(denoiser)
            if not frame_layers(denoiser):
                raise ArgumentError(
                    f"pipe must have layers of softmax attention in which frames attend to each other, which "
                    f"{type(unwrap(denoiser)).__name__} has not"
                )
            model = model_of(denoiser)
            if self.prompts is not None and model.image_behind_text:
                raise ArgumentError(
                    f"prompts must be None for {type(unwrap(denoiser)).__name__}, whose layers see an image with the "
                    "text"
                )
            if model.frames_in_batch:
                continue
            for name in ("prompts", "trained_frames"):
                if getattr(self, name) is not None:
                    raise ArgumentError(
                        f"{name} must be None for {type(unwrap(denoiser)).__name__}, which takes the band alone"
                    )

    def processors(self, denoiser: nn.Module, session: PipelineSession) -> list[tuple[Layer, Tap]]:
        """Puts the band on the layers in which frames attend to each other; see `Guidance`."""
        return [
            (layer, _Band(self, session, layer)) for layer in frame_layers(denoiser) if _INPUT_LAYER not in layer.name
        ]

    @contextmanager
    def modules(self, denoiser: nn.Module, session: PipelineSession) -> Iterator[None]:
        """Gives every frame its text, and a position that the network knows; see `Guidance`."""
        with ExitStack() as stack:
            if self.prompts is not None:
                reads_prompt = callable(self.prompts) or self.prompts == "then"
                texts = FrameTexts(lambda prompt: self.states(prompt) or [prompt], reads_prompt, session)
                for layer in attention_layers(denoiser):
                    if layer.kind == "cross":
                        hook = layer.module.register_forward_pre_hook(texts.give, with_kwargs=True)
                        stack.callback(hook.remove)
            if self.trained_frames is not None:
                forwards = {
                    module: partial(_squeezed, module, module.forward, self.trained_frames, session)
                    for module in frame_positions(denoiser)
                }
                stack.enter_context(replaced_forwards(forwards))
                name = model_of(denoiser).frame_positions
                if name is not None:
                    stack.enter_context(_table(denoiser, name, self.trained_frames, session))
            yield

    def attach_videocrafter(self, unet: nn.Module, *, train_steps: int = 1000) -> AbstractContextManager[None]:
        """Puts the band on the UNet of VideoCrafter's own code (lvdm); a context manager.

            unet = model.model.diffusion_model
            with cvg.VSTAR(sigma={64: 1.0, 32: 8.0}).attach_videocrafter(unet):
                samples, _ = DDIMSampler(model).sample(S=25, …)

        Its samplers are not watched, so `stop` is here a share of the timesteps that the network was trained on: the
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
        return videocrafter.regularised(unet, self.band, self.stop, train_steps, self.backend)


def frame_positions(denoiser: nn.Module) -> list[nn.Module]:
    """The modules that add a position to each frame before temporal attention: tables `pe` of shape `[1, F, C]`."""
    from diffusers.models.embeddings import SinusoidalPositionalEmbedding

    return [one for one in denoiser.modules() if isinstance(one, SinusoidalPositionalEmbedding)]


class _Band(Tap):
    """The band on one layer, in the steps that have it."""

    def __init__(self, settings: VSTAR, session: PipelineSession, layer: Layer) -> None:
        self.settings = settings
        self.session = session
        self.layer = layer
        self.backend = settings.backend
        self.columns: dict[tuple[int, ...], int] = {}  # (F, H, W) of the latents → of the layer's grid

    def active(self) -> bool:
        call = self.session.call_now()
        return call is not None and self.settings.guides(call)

    def band(self, attention: Attention) -> dict[str, Any]:
        call = self.session.call_now()
        if call is None:
            return {}
        if self.layer.kind == "temporal":
            size = tuple(call.latents.shape[2:])
            if size not in self.columns:  # a layer that is replayed has fewer samples than the call around
                positions = attention.query.shape[0] // call.geometry.samples(attention.disturbs)
                self.columns[size] = call.geometry.grid(positions)[2]
            columns = self.columns[size]
            options = self.settings.band(columns, size[-1])
        else:
            tokens = attention.query.shape[2]
            grid = call.geometry.grid(tokens)
            columns = grid[2]
            options = self.settings.band(columns, columns)
            if options:
                begin = call.geometry.video_begins(self.layer, tokens)
                options["frames"] = token_frames(grid, tokens, attention.query.device, begin)
        if call.own:
            return options
        if options:
            self.session.run.mark(call)
        else:
            self.session.run.notes.setdefault("widths", set()).add(columns)
        return options


def _squeezed(module: Any, stock: Any, known: int, session: PipelineSession, x: torch.Tensor) -> torch.Tensor:
    """Adds the positions of a squeezed clip instead of its own, of which the table may have too few."""
    if x.shape[1] <= known:
        return stock(x)
    _mark(session)
    positions = interpolate_states(module.pe[0, :known, None], x.shape[1])  # [F, 1, C]
    return x + positions[:, 0].to(x.dtype)


def _mark(session: PipelineSession) -> None:
    """Notes that the positions of a step's frames are other ones."""
    call = session.call_now()
    if call is not None and not call.own:
        session.run.mark(call)


@contextmanager
def _table(denoiser: nn.Module, name: str, known: int, session: PipelineSession) -> Iterator[None]:
    """Lets a denoiser that adds one table of positions add that of a squeezed clip, of the length of each call."""
    table = getattr(denoiser, name)

    def put(positions: torch.Tensor) -> None:
        """In the dtype and on the device of the present one: the pipeline may have been moved meanwhile."""
        setattr(denoiser, name, positions.to(getattr(denoiser, name)))

    def fit(*_: Any) -> None:
        call = session.call_now()
        if call is None:
            return
        frames = call.latents.shape[2]
        positions = table[:, : min(known, frames)]
        if frames > known:
            _mark(session)
            positions = interpolate_states(positions[0, :, None], frames).transpose(0, 1)
        put(positions)

    hook = denoiser.register_forward_pre_hook(fit)
    try:
        yield
    finally:
        hook.remove()
        put(table)
