"""Vico: every word of the prompt gets its share of the flow.

"Compositional Video Generation as Flow Equalization". The attention of the video to a word is followed through the
temporal attention layers as a flow; the latents are moved so that the word with the least flow gets more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from cvg_kernels.capture.layer_capture import LayerCapture
from cvg_kernels.capture.tokens import TokenSpan, Word, prompt_token_ids, token_spans
from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.attach import Attachment, Run, Step
from cvg_kernels.guidance.descent import descend
from cvg_kernels.guidance.flow_graph import FlowForm, Group, flow_groups, flow_of
from cvg_kernels.guidance.losses import fairness_loss
from cvg_kernels.guidance.steps import LatentStepper, StepRule
from cvg_kernels.ops import token_peaks

#: Words that are never what a prompt is about; the default choice of words leaves them out.
_FUNCTION_WORDS = frozenset(
    "a an the and or of in on at to with from by for is are was be its it this that while as into then "  # noqa: SIM905
    "over under near next moving move moves left right up down".split()
)


@dataclass(frozen=True)
class Vico:
    """Vico's guidance; attach it to a pipeline as a context manager.

        with cvg.Vico(words=["circle", "square"]).attach(pipe) as run:
            frames = pipe("a red circle moving left and a blue square moving right").frames[0]
        run.history   # loss and scores at every evaluation

    At each guided step the conditional branch runs up to its last captured layer; per group of layers the flow
    R = T₂ ⊙ T₁ ⊙ X (`path_flow`) leads to the score A_k of each word (`token_peaks`), and the latents go down the
    gradient of 1 − min_k A_k. Released code and paper differ in many places; each is an option, and `Vico.released()`
    and `Vico.paper()` set them as the one and the other have them. The defaults are those of the released graph with
    the step rule and size chosen on the shapes world (see the README), because the released optimiser's learning rate
    depends on fp16 rounding and does not carry over.

    Attributes:
        words: what to balance, as for `capture`, or a function of the prompt; `None` takes the prompt's content words:
            all but articles, prepositions, conjunctions and the words of motion.
        flow: `"soft"` (default of paper and code), `"hard"`, `"exact"`: the maximum flow that both stand for, or
            `"cross"`: the cross-attention alone (paper, table 4).
        spatial: let the flow pass through the attention within frames, between the text layer and the temporal ones, as
            the paper has it and its code has not (networks with such layers: AnimateDiff, ModelScope, Latte). With
            `flow="exact"` the positions are coupled: a token's score comes from its flow to the whole video.
        temperature: of the soft flow (0.01 in both).
        residual: skip connections as `"average"` (A+I)/2 (code), `"add"` A+I (paper) or `None`.
        combine: `"mean"` over groups (code) or `"max"` (paper, eq. 5).
        loss: `"min"` (both) or `"variance"` (paper's ablation).
        normalize: token softmax, smoothing and peak of the code (`True`), or the paper's bare flow, largest over frames
            and positions (`False`).
        sharpness: factor before the token softmax (100 in the code).
        levels: which resolutions take part, as grid sizes h·w relative to the largest with text attention: `"auto"` all
            of them; a tuple of (h, w) names them. The code takes one level, 1/32 of the image.
        step_rule: `"normalized"`, `"adam"` (both; fp16 in the code, float32 here) or `"sgd"`.
        step_size: see `LatentStepper`.
        until: share of the denoising steps that are guided, from the first (both: 0.5; on the shapes world later guidance
            spoils the motion).
        iterations: updates per guided step; or step index → updates, where a step not named has one (code: up to 10
            at steps 0, 10 and 20).
        thresholds: no update once every loss is below; a number (paper: 0.2), or step index → number with 0.2 for the
            others (code: {0: 0.95, 10: 0.5, 20: 0.2}).
        step_decay: shrink the step over the run as √linspace(1, 0.5) (code).
        backend: of the operations.
    """

    words: Sequence[Word] | Callable[[str], Sequence[Word]] | None = None
    flow: FlowForm = "soft"
    spatial: bool = False
    temperature: float = 0.01
    residual: Literal["average", "add"] | None = "average"
    combine: Literal["mean", "max"] = "mean"
    loss: Literal["min", "variance"] = "min"
    normalize: bool = True
    sharpness: float = 100.0
    levels: Literal["auto"] | Sequence[tuple[int, int]] = "auto"
    step_rule: StepRule = "normalized"
    step_size: float = 0.03
    until: float = 0.15
    iterations: int | dict[int, int] = 3
    thresholds: float | dict[int, float] = 0.0
    step_decay: bool = False
    backend: str = "auto"

    @classmethod
    def released(cls, words: Sequence[Word] | None = None, **changes: Any) -> Vico:
        """The settings of the released code (its optimiser in float32)."""
        settings = cls(
            words=words,
            step_rule="adam",
            step_size=1e-4,
            until=0.5,
            iterations={0: 10, 10: 10, 20: 10},
            thresholds={0: 0.95, 10: 0.5, 20: 0.2},
            step_decay=True,
        )
        return replace(settings, **changes)

    @classmethod
    def paper(cls, words: Sequence[Word] | None = None, **changes: Any) -> Vico:
        """The settings of the paper's text."""
        settings = cls(
            words=words,
            residual="add",
            combine="max",
            normalize=False,
            step_rule="adam",
            step_size=1e-5,
            until=0.5,
            iterations=1,
            thresholds=0.2,
        )
        return replace(settings, **changes)

    def __post_init__(self) -> None:
        choices = {
            "flow": ("soft", "hard", "exact", "cross"),
            "residual": ("average", "add", None),
            "combine": ("mean", "max"),
            "loss": ("min", "variance"),
            "step_rule": ("normalized", "adam", "sgd"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ArgumentError(
                    f"{name} must be one of {', '.join(map(repr, accepted))}, got {getattr(self, name)!r}"
                )
        for name in ("temperature", "sharpness"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 <= self.until <= 1:
            raise ArgumentError(f"until must lie in [0, 1], got {self.until!r}")
        if self.step_size < 0:
            raise ArgumentError(f"step_size must not be negative, got {self.step_size!r}")
        given = self.words is not None and not callable(self.words)
        if isinstance(self.words, str) or (given and len(self.words) == 0):
            raise ArgumentError(
                f"words must be a list of at least one word or None, got {self.words!r}"
            )

    def attach(self, pipe: Any, prompt: str | list[str] | None = None) -> Attachment:
        """Connects to a pipeline; a context manager that yields the `Run` with its history.

        Args:
            pipe: a diffusers pipeline (AnimateDiff, ModelScope, Latte, Wan, CogVideoX).
            prompt: says what the prompt is if the pipeline is called with `prompt_embeds`.

        Raises:
            ArgumentError: for a pipeline that cannot be guided.
        """
        return Attachment(self, pipe, prompt)

    def move(self, step: Step, run: Run) -> torch.Tensor | None:
        """Moves the latents of one denoising step; see `attach.Method`."""
        if step.index >= math.ceil(self.until * step.count):
            return None
        tokens = _Tokens(step, self.words, step.latents.device)
        groups = flow_groups(step.denoiser, self.flow, self.spatial)
        iterations = self.iterations
        if isinstance(iterations, dict):
            iterations = iterations.get(step.index, 1)
        threshold = self.thresholds
        if isinstance(threshold, dict):
            threshold = threshold.get(step.index, 0.2)
        size = self.step_size
        if self.step_decay:
            size *= math.sqrt(1 - 0.5 * step.index / max(step.count - 1, 1))
        layers = LayerCapture(
            step.denoiser,
            tokens.ids,
            [group.cross for group in groups],
            [name for group in groups for name in group.temporal],
            [group.spatial for group in groups if group.spatial],
            backend=self.backend,
        )

        def loss_at(z: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            peaks = self.scores(layers.run(lambda: step.denoise(z)), groups, tokens)
            return fairness_loss(peaks, self.loss), {"peaks": tokens.by_word(peaks.detach())}

        stepper = LatentStepper(self.step_rule, size)
        with layers:
            return descend(step, run, loss_at, stepper, iterations=iterations, threshold=threshold)

    def scores(
        self, maps: dict[str, torch.Tensor], groups: list[Group], tokens: _Tokens
    ) -> torch.Tensor:
        """Scores A `[B, words]` from the captured maps, differentiable.

        Args:
            maps: layer name → maps, cross `[B, K, F, h, w]` of all prompt tokens, temporal `[B, h·w, F, F]`.
            groups: the graphs.
            tokens: which tokens are words.
        """
        by_grid: dict[tuple[int, int], list[torch.Tensor]] = {}
        for group in groups:
            grid = tuple(maps[group.cross].shape[-2:])
            if self.levels != "auto" and grid not in {tuple(level) for level in self.levels}:
                continue
            by_grid.setdefault(grid, []).append(
                flow_of(group, maps, self.flow, self.temperature, self.residual, self.backend)
            )
        if not by_grid:
            there = sorted({tuple(maps[group.cross].shape[-2:]) for group in groups})
            raise ArgumentError(f"levels={self.levels!r} has no layer; the grids there: {there}")
        scores = []
        for flows in by_grid.values():
            stacked = torch.stack(flows)
            flow = stacked.mean(0) if self.combine == "mean" else stacked.amax(0)
            scores.append(self._word_scores(flow, tokens))
        stacked = torch.stack(scores)
        return stacked.mean(0) if self.combine == "mean" else stacked.amax(0)

    def _word_scores(self, flow: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
        """Score of each word `[B, words]`: of its strongest token."""
        if self.normalize:
            flow = flow.masked_fill(~tokens.real[:, :, None, None, None], -torch.inf)
            peaks = token_peaks(flow, sharpness=self.sharpness)
        else:
            peaks = flow.amax((2, 3, 4))
        return torch.stack(
            [torch.stack([peaks[b, list(columns)].amax() for columns in words])
             for b, words in enumerate(tokens.words)]
        )  # fmt: skip


class _Tokens:
    """All tokens of each prompt, padded to one length, and which of them make up each word."""

    def __init__(self, step: Step, words: Any, device: torch.device) -> None:
        tokenizer = step.pipe.tokenizer
        prompts = step.prompts
        ids = [prompt_token_ids(tokenizer, prompt) for prompt in prompts]
        width = max(len(one) for one in ids)
        padded = [[*one, *[one[0]] * (width - len(one))] for one in ids]
        self.ids = torch.tensor(padded)  # on the host
        self.real = torch.tensor(
            [[at < len(one) for at in range(width)] for one in ids], device=device
        )
        choose = content_words if words is None else words if callable(words) else lambda _: words
        spans = [token_spans(tokenizer, prompt, choose(prompt)) for prompt in prompts]
        if len({len(one) for one in spans}) > 1:
            raise ArgumentError(
                "words must be as many for every prompt of a batch; give them, or run the prompts one by one"
            )
        self.spans: list[list[TokenSpan]] = spans
        self.words = [
            [tuple(one.index(at) for at in span.ids) for span in per_prompt]
            for one, per_prompt in zip(ids, spans, strict=True)
        ]

    def by_word(self, peaks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Scores `[B, words]` as word → score, for each prompt."""
        return [
            {span.word: value for span, value in zip(spans, row, strict=True)}
            for spans, row in zip(self.spans, peaks, strict=True)
        ]


def content_words(prompt: str) -> list[Word]:
    """The words a prompt is about, each with its occurrence: all but function words and words of motion.

    Raises:
        ArgumentError: if none is left.
    """
    seen: dict[str, int] = {}
    chosen: list[Word] = []
    for word in re.findall(r"\w+", prompt):
        lower = word.lower()
        if lower in _FUNCTION_WORDS:
            continue
        chosen.append((word, seen.get(lower, 0)))
        seen[lower] = seen.get(lower, 0) + 1
    if not chosen:
        raise ArgumentError(f"words must be given: the prompt {prompt!r} has no content word")
    return chosen
