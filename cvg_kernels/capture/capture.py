"""`capture`: what each word looked at, at every step and layer of a pipeline call."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import interpolate

from cvg_kernels.capture.layer_capture import layer_maps
from cvg_kernels.capture.layers import Layer, attention_layers, denoisers_of, model_of
from cvg_kernels.capture.processors import InterceptingProcessor, installed, refuse_compiled
from cvg_kernels.capture.prompts import Branch, PromptWatch
from cvg_kernels.capture.tokens import TokenSpan, Word, check_reach, prompt_token_ids, token_spans
from cvg_kernels.errors import ArgumentError


@dataclass(frozen=True)
class Record:
    """The maps of one layer in one denoiser call."""

    step: int  #: denoising step, 0 first
    timestep: float
    layer: str  #: dotted path of the attention module
    kind: Literal["cross", "temporal"]
    branch: Branch
    words: tuple[str, ...]  #: names along the K dimension of cross maps
    grid: tuple[int, int, int]  #: frames, rows, columns
    maps: (
        torch.Tensor
    )  #: cross `[B, K, F, h, w]` (`[B, heads, K, …]` per head), temporal `[B, h·w, F, F]`


@dataclass
class _Call:
    """A denoiser call under way."""

    step: int
    timestep: float
    latents: tuple[int, ...]
    branches: list[Branch]
    token_ids: torch.Tensor  # [B, tokens], every token of every word
    membership: torch.Tensor  # [B, K, tokens], 1 where a token belongs to a word


class Capture:
    """Records attention maps while it is open; made by `capture`, whose arguments are explained there."""

    def __init__(
        self, pipe: Any, words: Sequence[Word] | Literal["all"] | None, *, prompt: str | list[str] | None,
        layers: str | Callable[[str], bool] | None, temporal: bool, head_reduction: str,
        steps: Collection[int] | None, gradients: bool, keep: str, backend: str,
    ) -> None:  # fmt: skip
        if isinstance(words, str) and words != "all":
            raise ArgumentError(f"words must be a list of words, 'all' or None, got {words!r}")
        if words is not None and len(words) == 0:
            raise ArgumentError("words must name at least one word, or be None or 'all', got none")
        if words is None and not temporal:
            raise ArgumentError("words must be given unless temporal=True, got None")
        if head_reduction not in ("mean", "none"):
            raise ArgumentError(f"head_reduction must be 'mean' or 'none', got {head_reduction!r}")
        if keep not in ("cpu", "device"):
            raise ArgumentError(f"keep must be 'cpu' or 'device', got {keep!r}")
        self.records: list[Record] = []
        self.tokens: list[list[TokenSpan]] = []  #: per prompt, what each word resolved to
        self._pipe = pipe
        self._words = words
        self._layers = layers
        self._kinds = ({"temporal"} if temporal else set()) | ({"cross"} if words else set())
        self._head_reduction = head_reduction
        self._steps = steps
        self._gradients = gradients
        self._keep = keep
        self._backend = backend
        self._watch = PromptWatch(pipe, prompt)
        self._call: _Call | None = None
        self._step, self._timestep, self._run = -1, None, -1
        self._run_of_tokens = -1

    def __enter__(self) -> Capture:
        with ExitStack() as stack:
            processors = {}
            for denoiser in denoisers_of(self._pipe):
                refuse_compiled(denoiser)
                model_of(denoiser)
                for layer in self._chosen(denoiser):
                    processors[layer.module] = InterceptingProcessor.wrap(
                        layer.module.processor, layer.name, self._handler(denoiser, layer)
                    )
                before = denoiser.register_forward_pre_hook(self._begin_call, with_kwargs=True)
                after = denoiser.register_forward_hook(self._end_call, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            if not processors:
                raise ArgumentError(f"layers={self._layers!r} selects no layer of the denoiser")
            stack.enter_context(installed(processors))
            stack.enter_context(self._watch)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _chosen(self, denoiser: nn.Module) -> list[Layer]:
        wanted = self._layers
        if isinstance(wanted, str):
            wanted = re.compile(wanted).search
        return [
            layer
            for layer in attention_layers(denoiser)
            if layer.kind in self._kinds and (wanted is None or wanted(layer.name))
        ]

    def _begin_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a denoiser call: which step and branches it is, and which tokens are wanted."""
        model = model_of(denoiser)
        latents = model.latents_of(args, kwargs)
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timestep = float(torch.as_tensor(timestep).flatten()[0])
        if self._run != self._watch.runs:
            self._step, self._timestep, self._run = -1, None, self._watch.runs
        if timestep != self._timestep:
            self._step, self._timestep = self._step + 1, timestep
        self._call = None
        if self._steps is None or self._step in self._steps:
            text = kwargs["encoder_hidden_states"]
            branches = self._watch.branches(latents.shape[0], text, model.batched_branches)
            token_ids, membership = self._resolve(branches, latents.device, text.shape[1])
            self._call = _Call(
                self._step, timestep, tuple(latents.shape), branches, token_ids, membership
            )

    def _end_call(self, denoiser: nn.Module, args: tuple, output: Any) -> None:
        """After a call, also a failed one: layers that run again in a backward pass are not recorded."""
        self._call = None

    def _resolve(
        self, branches: list[Branch], device: torch.device, text_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of each sample, and which word each belongs to; unconditional samples look at the same places."""
        if not self._words:
            return torch.empty(len(branches), 0, dtype=torch.int64), torch.empty(0)
        if self._run_of_tokens != self._watch.runs:
            tokenizer = self._pipe.tokenizer
            self.tokens = [
                _all_spans(tokenizer, prompt)
                if self._words == "all"
                else token_spans(tokenizer, prompt, self._words)
                for prompt in self._watch.prompts()
            ]
            if len({len(spans) for spans in self.tokens}) > 1:
                raise ArgumentError("words='all' needs prompts of the same number of tokens")
            self._run_of_tokens = self._watch.runs
        each = [
            [(at, k) for k, span in enumerate(spans) for at in span.ids] for spans in self.tokens
        ]
        width = max(len(tokens) for tokens in each)
        ids = torch.zeros(len(each), width, dtype=torch.int64)
        membership = torch.zeros(len(each), len(self.tokens[0]), width)
        for sample, tokens in enumerate(each):
            for column, (at, k) in enumerate(tokens):
                ids[sample, column] = at
                membership[sample, k, column] = 1
        check_reach(ids, text_length)
        repeat = len(branches) // len(each)
        return ids.repeat(repeat, 1).to(device), membership.repeat(repeat, 1, 1).to(device)

    def _handler(self, denoiser: nn.Module, layer: Layer) -> Callable[..., torch.Tensor | None]:
        model = model_of(denoiser)
        last: dict[str, Any] = {}  # a replayed layer computes as it did in its call

        def attend(query, key, value, mask, scale):
            call = self._call or (last.get("call") if self._gradients else None)
            if call is None:
                return None
            last["call"] = call
            out, maps, grid = layer_maps(
                layer, model, denoiser, call.latents, call.token_ids, self._head_reduction,
                self._backend, query, key, value, mask, scale,
            )  # fmt: skip
            maps = self._by_word(
                layer, call, maps
            )  # in a replay too: it must save what the call saved
            if self._call is not None:
                self._record(layer, call, maps, grid)
            return out

        return attend

    def _by_word(self, layer: Layer, call: _Call, maps: torch.Tensor) -> torch.Tensor:
        """Sums the maps of the tokens of each word."""
        if layer.kind == "temporal":
            return maps
        pattern = "bkt,btfhw->bkfhw" if maps.ndim == 5 else "bkt,bntfhw->bnkfhw"
        return torch.einsum(pattern, call.membership.to(maps.dtype), maps)

    def _record(self, layer: Layer, call: _Call, maps: torch.Tensor, grid: tuple) -> None:
        words = tuple(_label(span) for span in self.tokens[0]) if layer.kind == "cross" else ()
        if not self._gradients:
            maps = maps.detach()
        for branch in dict.fromkeys(call.branches):
            samples = [at for at, name in enumerate(call.branches) if name == branch]
            part = maps[samples[0] : samples[-1] + 1]
            if self._keep == "cpu" and not self._gradients:
                part = part.cpu()
            self.records.append(
                Record(call.step, call.timestep, layer.name, layer.kind, branch, words, grid, part)
            )

    def heat_map(
        self,
        word: str,
        occurrence: int = 0,
        *,
        branch: Branch = "cond",
        sample: int = 0,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Where a word looked: its cross-attention, averaged over steps, layers and heads.

        Args:
            word: one of the captured words.
            occurrence: which of its occurrences.
            branch: `"cond"` or `"uncond"`.
            sample: which video of the batch.
            size: rows and columns of the result; by default the largest grid of the captured layers.

        Returns:
            float32 `[F, H, W]` on the CPU; maps of smaller layers are resized bicubically.

        Raises:
            ArgumentError: for a word that was not captured (lists those that were).
        """
        label = _label(TokenSpan(word, occurrence, ()))
        maps = [r for r in self.records if r.kind == "cross" and r.branch == branch]
        if not maps or label not in maps[0].words:
            there = ", ".join(maps[0].words) if maps else "none"
            raise ArgumentError(
                f"word {label!r} was not captured on branch {branch!r}; captured: {there}"
            )
        size = size or max((record.grid[1:] for record in maps), key=lambda grid: grid[0] * grid[1])
        total = 0
        for record in maps:
            chosen = record.maps[sample].detach().float().cpu()
            chosen = chosen.mean(0) if chosen.ndim == 5 else chosen  # per head
            one = chosen[record.words.index(label)]  # [F, h, w]
            total = (
                total + interpolate(one[:, None], size, mode="bicubic", align_corners=False)[:, 0]
            )
        return total / len(maps)


def _label(span: TokenSpan) -> str:
    """The name of a word; a later occurrence carries its number."""
    return span.word if span.occurrence == 0 else f"{span.word}#{span.occurrence}"


def _all_spans(tokenizer: Any, prompt: str) -> list[TokenSpan]:
    """Every token of the prompt as a word of its own, named as the tokenizer prints it."""
    ids = prompt_token_ids(tokenizer, prompt)
    encoded = tokenizer(prompt).input_ids
    seen: dict[str, int] = {}
    spans = []
    for at in ids:
        name = tokenizer.decode([encoded[at]]).strip()
        spans.append(TokenSpan(name, seen.get(name, 0), (at,)))
        seen[name] = seen.get(name, 0) + 1
    return spans


def capture(
    pipe: Any,
    words: Sequence[Word] | Literal["all"] | None = None,
    *,
    prompt: str | list[str] | None = None,
    layers: str | Callable[[str], bool] | None = None,
    temporal: bool = False,
    head_reduction: Literal["mean", "none"] = "mean",
    steps: Collection[int] | None = None,
    gradients: bool = False,
    keep: Literal["cpu", "device"] = "cpu",
    backend: str = "auto",
) -> Capture:
    """Records where words look while a pipeline runs; a context manager.

        with cvg.capture(pipe, words=["circle", "square"]) as captured:
            frames = pipe("a red circle moving left and a blue square moving right").frames[0]
        captured.heat_map("circle")

    The pipeline's own processors run, their attention computed by `attention_with_capture`; the video is that of the
    stock pipeline to floating-point tolerance. Everything is put back on exit, also after an exception.

    Args:
        pipe: a diffusers pipeline whose denoiser is in `capture.layers.MODELS` (AnimateDiff, ModelScope, Latte, Wan,
            CogVideoX).
        words: words or phrases of the prompt, or pairs (word, occurrence); a word of several tokens is their sum.
            `"all"` takes every token of the prompt; `None` none (with `temporal=True`).
        prompt: says what the prompt is if the pipeline is called with `prompt_embeds`.
        layers: regular expression or predicate on layer names; `None` takes all.
        temporal: also record the temporal attention maps `[B, h·w, F, F]`, mean over heads.
        head_reduction: `"mean"`, or `"none"` to keep the heads of cross maps.
        steps: record in these steps only.
        gradients: keep the maps attached to the graph; run the denoiser with gradients enabled then.
        keep: `"cpu"` moves maps off the device at once, `"device"` leaves them there.
        backend: of `attention_with_capture`.

    Returns:
        A `Capture` with `records`, `tokens` and `heat_map(word)`.

    Raises:
        ArgumentError: for arguments that do not fit, a compiled denoiser, or (when the pipeline runs) a word that is
            not in the prompt.
    """
    return Capture(
        pipe, words, prompt=prompt, layers=layers, temporal=temporal, head_reduction=head_reduction,
        steps=steps, gradients=gradients, keep=keep, backend=backend,
    )  # fmt: skip
