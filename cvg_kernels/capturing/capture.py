"""`capture`: what each word looked at, at every step and layer of a pipeline call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cvg_kernels.backends import parse_backend
from cvg_kernels.capturing.choice import chosen_layers, chosen_steps
from cvg_kernels.capturing.recorder import Kind, RecordedCall, Recorder
from cvg_kernels.capturing.records import Record, heat_map
from cvg_kernels.capturing.viewer import Frames, write_viewer
from cvg_kernels.errors import ArgumentError, GuidanceWarning, check_flag
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.geometry import Branch
from cvg_kernels.pipeline.hooks import PipelineHooks
from cvg_kernels.pipeline.layers import Layer, attention_layers, check_undivided, frame_layers
from cvg_kernels.pipeline.models import (
    Grid,
    Model,
    denoisers_of,
    known_model,
    model_by_range,
    model_of,
    named_model,
    unwrap,
)
from cvg_kernels.pipeline.parallel import check_maps
from cvg_kernels.pipeline.sampling import Sampling
from cvg_kernels.pipeline.taps import Tap
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.token_table import TokenTable
from cvg_kernels.prompts.tokens import TokenSpan, Word, check_prompt, check_reach, checked_words


class Capture:
    """Records attention maps while it is open; made by `capture`, whose arguments are explained there.

    Attributes:
        records: the maps, in the order of the calls.
        tokens: for each prompt of the last run, what each word resolved to.
        prompt: as it was given to `capture`.
        changes_modules: `False`: a compiled denoiser stays compiled.
    """

    def __init__(
        self,
        pipe: VideoPipeline,
        words: Sequence[Word] | Literal["all"] | None,
        *,
        prompt: str | list[str] | None,
        layers: str | Sequence[str] | Callable[[str], bool] | None,
        temporal: bool,
        head_reduction: Literal["mean", "none"],
        steps: Collection[int] | int | None,
        gradients: bool,
        own_loop: bool,
        keep: str,
        backend: str,
        text: slice | None,
        grid: Grid | None,
    ) -> None:
        if words is not None and words != "all":
            words = checked_words(words)
        check_prompt(prompt)
        parse_backend(backend)
        flags = {"temporal": temporal, "gradients": gradients, "own_loop": own_loop}
        for name, flag in flags.items():
            check_flag(name, flag)
        if words is None and not temporal:
            raise ArgumentError("words must be given unless temporal=True, got None")
        if head_reduction not in ("mean", "none"):
            raise ArgumentError(f"head_reduction must be 'mean' or 'none', got {head_reduction!r}")
        if keep not in ("cpu", "device"):
            raise ArgumentError(f"keep must be 'cpu' or 'device', got {keep!r}")
        if isinstance(pipe, nn.Module) or not hasattr(pipe, "scheduler"):
            raise ArgumentError(
                f"pipe must be a diffusers pipeline, which knows the words of its prompt, got {type(pipe).__name__}"
            )
        self.records: list[Record] = []
        self.tokens: list[list[TokenSpan]] = []
        self.prompt = prompt
        self._pipe: Any = pipe
        self._words = words
        self._chosen = chosen_layers(layers)
        self._layers = layers
        self._kinds = ({"temporal"} if temporal else set()) | ({"cross"} if words else set())
        self._head_reduction: Literal["mean", "none"] = head_reduction
        self._steps = chosen_steps(steps)
        self._gradients = gradients
        self._own_loop = own_loop or gradients
        self._keep = keep
        self._text, self._grid = text, grid
        if temporal and (text is not None or grid is not None):
            raise ArgumentError("temporal must be False where text and grid are named: they tell of the text's layers")
        self._backend = backend
        self._now: RecordedCall | None = None
        self._runs = 0

    def __enter__(self) -> Capture:
        if self._pipe is None:
            raise ArgumentError("this capture has been open already: make another one with capture(…)")
        with ExitStack() as stack:
            if self._text is not None or self._grid is not None:
                for denoiser in denoisers_of(self._pipe):
                    stack.enter_context(named_model(denoiser, self._model(denoiser)))
            self._check()
            self._hooks: PipelineHooks | None = PipelineHooks.of(self._pipe)
            self._hooks.add(self, own_loop=self._own_loop)
            self._named = stack.pop_all()
        return self

    def _model(self, denoiser: nn.Module) -> Model:
        """The entry of a denoiser that is not in the table, as the user tells it."""
        network = unwrap(denoiser)
        if known_model(network) is not None:
            raise ArgumentError(
                f"text and grid must be None for {type(network).__name__}, which is known: they are for others"
            )
        return model_by_range(network, self._text, self._grid)

    def _check(self) -> None:
        """Checks that the network is one whose maps can be had, now and before each run: it may be exchanged."""
        for denoiser in denoisers_of(self._pipe):
            model_of(denoiser)
            check_maps(denoiser)
            check_undivided(denoiser)
            kinds = {layer.kind for layer in attention_layers(denoiser)}
            if "cross" in self._kinds - kinds:
                raise ArgumentError(
                    f"words must be None for {type(unwrap(denoiser)).__name__}, which attends to no text"
                )
            if "temporal" in self._kinds and not frame_layers(denoiser):
                raise ArgumentError(
                    f"temporal must be False for {type(unwrap(denoiser)).__name__}: no layer that is known relates "
                    "its frames by softmax attention"
                )
            if not self.taps(denoiser):
                raise ArgumentError(f"layers={self._layers!r} selects no layer of the denoiser")

    def __exit__(self, kind: Any, *error: object) -> None:
        if self._hooks is not None:
            self._hooks.remove(self)
        self._named.close()
        if kind is None and not self.records:
            self._say_why_nothing()
        self._pipe = self._hooks = None  # heat maps that are kept do not keep a model

    def __repr__(self) -> str:
        words = ", ".join(self.words) or "no words"
        return f"Capture({words}: {len(self.records)} records of {self._runs} run(s))"

    @property
    def words(self) -> tuple[str, ...]:
        """Names of the captured words."""
        return next((record.words for record in reversed(self.records) if record.words), ())

    def heat_map(
        self,
        word: Word,
        occurrence: int = 0,
        *,
        branch: Branch = "cond",
        sample: int = 0,
        size: tuple[int, int] | None = None,
        run: int = -1,
        section: int | None = None,
    ) -> torch.Tensor:
        """Averages the cross-attention of a word over heads, steps and layers: where it looked.

        Every layer counts alike, and within it every step, however often a cache or a two-call scheduler ran it.

        Args:
            word: one of the captured words.
            occurrence: which of its occurrences.
            branch: `"cond"`, `"uncond"` or `"perturbed"`.
            sample: which video of the batch; −1 is the last.
            size: rows and columns of the result; by default the largest grid of the captured layers.
            run: which call of the pipeline, the last by default.
            section: which part of a video that one call makes part by part, the last by default (with a warning).

        Returns:
            float32 `[F, H, W]` on the CPU; maps of smaller layers are resized bicubically.

        Raises:
            ArgumentError: for a word, a branch, a sample or a run that was not captured (lists those that were).
        """
        return heat_map(self.records, word, occurrence, branch, sample, size, run, section)

    def write_viewer(self, path: str | Path, frames: Frames, *, prompt: str = "", fps: int = 6) -> Path:
        """Writes a page for the browser that plays the clip and, under the mouse, ranks the words by what they got
        there.

            with cvg.capture(pipe, words=["cat", "dog"]) as captured:
                frames = pipe("a cat and a dog", output_type="pt").frames[0]
            captured.write_viewer("maps.html", frames)

        Args:
            path: path of the page; it holds everything it shows.
            frames: `[F, 3, H, W]` in [0, 1], of the last run's first sample.
            prompt: shown above.
            fps: frames a second.

        Returns:
            The path.

        Raises:
            ArgumentError: if the frames are of another shape, or no maps of words were captured.
        """
        return write_viewer(path, {"clip": (frames, self)}, prompt=prompt, fps=fps)

    def _say_why_nothing(self) -> None:
        import warnings

        if self._runs == 0:
            kind = type(self._pipe).__name__
            reason = f"{kind} was not called in the block (own_loop=True is for a loop of your own)"
        elif self._grid is not None:
            reason = f"no layer has the keys {self._text} beside the {self._grid} tokens of the video"
        elif self._steps is not None:
            reason = f"the run made none of the steps {sorted(self._steps)}"
        else:
            reason = "no captured layer ran"
        warnings.warn(f"capture recorded nothing: {reason}", GuidanceWarning, stacklevel=3)

    # -- what the hooks tell

    def begin_run(self, sampling: Sampling) -> None:
        """Counts the runs, and checks what each is made with."""
        self._check()
        self._runs += 1
        self._now = None

    def end_run(self, sampling: Sampling) -> None:
        """Nothing is recorded between two runs."""
        self._now = None

    def taps(self, denoiser: nn.Module) -> list[tuple[Layer, Tap]]:
        """What asks the chosen layers for their maps."""
        wanted: list[tuple[Layer, Kind]] = []
        if "cross" in self._kinds:
            wanted.extend((one, "cross") for one in attention_layers(denoiser) if one.kind == "cross")
        if "temporal" in self._kinds:
            wanted.extend((layer, "temporal") for layer in frame_layers(denoiser))
        asked = (self._gradients, self._head_reduction, self._backend)
        return [(layer, Recorder(self, layer, kind, *asked)) for layer, kind in wanted if self._chosen(layer.name)]

    changes_modules = False

    def modules(self, denoiser: nn.Module) -> Any:
        """Nothing else is changed."""
        return nullcontext()

    def moves(self, call: Call) -> bool:
        """No latents are moved."""
        return False

    def before_step(self, call: Call) -> None:
        """Nothing is done before a step."""

    def after_call(self, call: Call, output: Any) -> None:
        """Ends the recording of a call: layers that run again in a backward pass are not recorded."""
        self._now = None

    def before_call(self, call: Call) -> None:
        """Finds the tokens of the words in the samples of a call, if it is recorded."""
        self._now = None
        if self._steps is None or call.index in self._steps:
            if self._words:
                self._now = self._with_tokens(call)
            else:
                self._now = RecordedCall(call, call.geometry, None)

    def _with_tokens(self, call: Call) -> RecordedCall:
        """A call with the tokens of every sample; samples without the prompt look at the same places, if they have
        them.
        """

        def find() -> TokenTable:
            words = self._words
            if isinstance(words, str):  # "all"
                self.tokens = [text.all_words() for text in call.texts]
            elif words is not None:
                self.tokens = call.find([words] * call.sampling.samples)
            if len({len(spans) for spans in self.tokens}) > 1:
                raise ArgumentError("words='all' needs prompts of the same number of tokens")
            return TokenTable.of(self.tokens)

        table = call.sampling.remember((self, "table"), find)
        geometry = call.geometry
        if "cond" in call.branches:
            check_reach(table.ids, geometry.text_length)
        elif table.ids.numel():
            geometry = geometry.reaching(int(table.ids.max()) + 1)
        table = table.repeat(len(call.branches) // len(table.ids)).to(call.latents.device)
        return RecordedCall(call, geometry, table)

    # -- what the taps ask

    def recorded(self) -> RecordedCall | None:
        """The pipeline's call that is under way and recorded; none while a method calls the denoiser."""
        call = None if self._hooks is None else self._hooks.call_now()
        return self._now if call is not None and not call.own else None

    def record(self, layer: Layer, kind: Kind, recorded: RecordedCall, maps: torch.Tensor, grid: Grid) -> None:
        """Keeps the maps of a layer, one record a branch."""
        call = recorded.call
        words = recorded.table.labels[0] if kind == "cross" and recorded.table is not None else ()
        if not self._gradients:
            maps = maps.detach()
        for branch in dict.fromkeys(call.branches):
            part = maps[call.samples(branch)]
            if not len(part):  # the disturbed samples of a layer that PAG lets attend to nothing
                continue
            if self._keep == "cpu" and not self._gradients:
                part = part.cpu()
            self.records.append(
                Record(
                    call.sampling.number,
                    call.index,
                    call.timestep,
                    layer.name,
                    kind,
                    branch,
                    words,
                    grid,
                    part,
                    call.section,
                )
            )


def capture(
    pipe: VideoPipeline,
    words: Sequence[Word] | Literal["all"] | None = None,
    *,
    prompt: str | list[str] | None = None,
    layers: str | Sequence[str] | Callable[[str], bool] | None = None,
    temporal: bool = False,
    head_reduction: Literal["mean", "none"] = "mean",
    steps: Collection[int] | int | None = None,
    gradients: bool = False,
    own_loop: bool = False,
    keep: Literal["cpu", "device"] = "cpu",
    backend: str = "auto",
    text: slice | None = None,
    grid: Grid | None = None,
) -> Capture:
    """Records where words look while a pipeline runs; a context manager.

        with cvg.capture(pipe, words=["circle", "square"]) as captured:
            frames = pipe("a red circle moving left and a blue square moving right").frames[0]
        captured.heat_map("circle")

    The pipeline's own processors run, their attention computed by `attention_with_capture`; the video is that of the
    stock pipeline to floating-point tolerance. Everything is put back at the end of each call of the pipeline, also
    after an exception. Calls that a guidance method makes itself are not recorded.

    Args:
        pipe: a diffusers pipeline whose denoiser is in `pipeline.models.MODELS` or derives from one there; another one
            needs `text` and `grid`.
        words: words or phrases of the prompt, each the first time it occurs there, or pairs (word, occurrence); a word
            of several tokens is their sum.
            `"<begin>"` and `"<end>"` are the tokens around the prompt. `"all"` takes every token of the prompt; `None`
            none (with `temporal=True`).
        prompt: says what the prompt is if the pipeline is called with `prompt_embeds`.
        layers: regular expression, list of names or predicate on layer names; `None` takes all.
        temporal: also record the temporal attention maps `[B, h·w, F, F]`, mean over heads. Where attention spans the
            video (Wan, CogVideoX, HunyuanVideo, LTX …), these are `temporal_maps`: the probabilities with which a
            place of one frame attends to itself in the others, whose rows sum to what it pays to itself.
        head_reduction: `"mean"`, or `"none"` to keep the heads of cross maps.
        steps: record in these steps only; the first that the run makes is 0.
        gradients: keep the maps attached to the graph. Pipelines run without gradients, so this is for a loop of your
            own, as with `own_loop`.
        own_loop: you call the pipeline's denoiser and scheduler yourself, and the block is one run.
        keep: `"cpu"` moves maps off the device at once, `"device"` leaves them there.
        backend: which implementation of `attention_with_capture` to use.
        text: for a denoiser that is not in the table, which keys of its layers are the text's: `slice(0, 226)` if the
            text is first, `slice(-256, None)` if last, the whole range where it stands alone. Layers with other keys,
            and those whose keys are the video, are left out. The words' tokens are counted from its beginning.
        grid: for such a denoiser, frames, rows and columns of the video's tokens; they stand right before the text, or
            behind one that is first, and a layer may see the frames one by one.

    Returns:
        A `Capture` with `records`, `tokens` and `heat_map(word)`.

    Raises:
        ArgumentError: for arguments that do not fit, a denoiser that is not known, or (when the pipeline runs) a word
            that is not in the prompt.
    """
    return Capture(
        pipe,
        words,
        prompt=prompt,
        layers=layers,
        temporal=temporal,
        head_reduction=head_reduction,
        steps=steps,
        gradients=gradients,
        own_loop=own_loop,
        keep=keep,
        backend=backend,
        text=text,
        grid=grid,
    )
