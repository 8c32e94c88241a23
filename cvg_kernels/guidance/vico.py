"""Vico: every word of the prompt gets its share of the flow.

"Compositional Video Generation as Flow Equalization". The attention of the video to a word is followed through the
temporal attention layers as a flow; the latents are moved so that the word with the least flow gets more. In networks
whose attention spans the video, how the frames attend to each other at every place (`temporal_maps`, of the frames
alone) in the next block takes the place of temporal attention.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from cvg_kernels.errors import ArgumentError, GuidanceWarning, check_flag, is_whole
from cvg_kernels.guidance.base import Guidance, check_choice, check_count, check_number
from cvg_kernels.guidance.descent import descend
from cvg_kernels.guidance.flow_graph import FlowForm, Group, flow_groups, flow_of
from cvg_kernels.guidance.losses import MAP_LOSSES, fairness_loss
from cvg_kernels.guidance.steps import STEP_RULES, LatentStepper, StepRule
from cvg_kernels.ops import token_peaks
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.guards import check_extra_forwards
from cvg_kernels.pipeline.layer_capture import LayerCapture
from cvg_kernels.pipeline.layers import check_undivided
from cvg_kernels.pipeline.models import denoisers_of
from cvg_kernels.pipeline.session import Run
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.token_table import TokenTable
from cvg_kernels.prompts.tokens import Word, checked_words
from cvg_kernels.prompts.words import content_words, nouns_and_verbs


@dataclass(frozen=True)
class Vico(Guidance):
    """Vico's guidance; attach it to a pipeline as a context manager.

        with cvg.Vico(words=["circle", "square"]).attach(pipe) as run:
            frames = pipe("a red circle moving left and a blue square moving right").frames[0]
        run.history   # loss and scores at every evaluation

    At each guided step the conditional branch runs up to its last captured layer; per group of layers the flow
    R = T₂ ⊙ T₁ ⊙ X (`path_flow`) leads to the score A_k of each word (`token_peaks`), and the latents go down the
    gradient of 1 − min_k A_k. Released code and paper differ in many places; each is an option, and `Vico.released()`
    and `Vico.paper()` set them as the one and the other have them. The defaults are those of the released graph with
    the step rule and size chosen on the shapes world (see docs/vico.md), because the released optimiser's learning
    rate depends on fp16 rounding and does not carry over.

    Attributes:
        words: what to balance, as for `capture`, or a function of the prompt; `None` takes the prompt's content words:
            all but articles, prepositions, conjunctions and the words of motion.
        flow: `"soft"` (default of paper and code), `"hard"`, `"exact"`: the maximum flow that both stand for,
            `"rollout"`: the product of the maps (attention rollout), or `"cross"`: the cross-attention alone (paper,
            table 4).
        spatial: let the flow pass through the attention within frames, between the text layer and the temporal ones,
            as the paper has it and its code has not (networks with such layers: AnimateDiff, ModelScope, Latte). With
            `flow="exact"` the positions are coupled: a token's score comes from its flow to the whole video.
        temperature: temperature of the soft flow (0.01 in both).
        order: which product of the soft flow comes first: `"tokens_first"`, T₂ ⊙ (T₁ ⊙ X), or `"hops_first"`,
            (T₂ ⊙ T₁) ⊙ X (code). They differ by up to 0.02 at a temperature of 0.01; see `path_flow` for what each
            costs.
        residual: skip connections as `"average"` (A+I)/2 (code), `"add"` A+I (paper) or `None`.
        combine: `"mean"` over groups (code) or `"max"` (paper, eq. 5).
        loss: what is made of the words' scores, `"min"` (both) or `"variance"` (paper's ablation); or of their maps:
            `"concentration"`, how widely the most scattered one is spread, `"separation"`, how much they overlap, or
            `"binding"`, how far an attribute's map is from that of the word it stands directly before among `words`
            ("red circle"), and how much each of the two overlaps others. See `guidance.losses`.
        normalize: token softmax, smoothing and peak of the code (`True`), or the paper's bare flow, largest over
            frames and positions (`False`).
        sharpness: factor before the token softmax (100 in the code).
        sinks: words that the token softmax leaves out, because they take nearly all of it whatever the latents are, as
            the last word of a prompt often does; `"others"` leaves out every token of no balanced word. `None`: all
            tokens of the prompt take part (code). A `GuidanceWarning` names the token if one has taken it all.
        levels: which resolutions take part, as grid sizes h·w relative to the largest with text attention: `"auto"`
            all of them; a tuple of (h, w) names them. The code takes one level, 1/32 of the image.
        step_rule: `"normalized"`, `"adam"` (both; fp16 in the code, float32 here) or `"sgd"`.
        step_size: see `LatentStepper`.
        stop: share of the denoising steps that are guided (both: 0.5; on the shapes world later guidance spoils
            motion).
        iterations: updates per guided step; or step index → updates, where a step not named has one (code: up to 10
            at steps 0, 10 and 20).
        thresholds: no update once every loss is below; a number (paper: 0.2), or step index → number with 0.2 for the
            others (code: {0: 0.95, 10: 0.5, 20: 0.2}).
        step_decay: shrink the step over the run as √linspace(1, 0.5) (code).
        backend: which implementation of the operations to use.
    """

    words: Sequence[Word] | Callable[[str], Sequence[Word]] | None = None
    flow: FlowForm = "soft"
    spatial: bool = False
    temperature: float = 0.01
    order: Literal["tokens_first", "hops_first"] = "tokens_first"
    residual: Literal["average", "add"] | None = "average"
    combine: Literal["mean", "max"] = "mean"
    loss: Literal["min", "variance", "concentration", "separation", "binding"] = "min"
    normalize: bool = True
    sharpness: float = 100.0
    sinks: Sequence[Word] | Literal["others"] | None = None
    levels: Literal["auto"] | Sequence[tuple[int, int]] = "auto"
    step_rule: StepRule = "normalized"
    step_size: float = 0.03
    iterations: int | dict[int, int] = 3
    thresholds: float | dict[int, float] = 0.0
    step_decay: bool = False
    backend: str = "auto"
    stop: float = field(default=0.15, kw_only=True)

    @classmethod
    def released(cls, words: Sequence[Word] | None = None, **changes: Any) -> Vico:
        """The settings of the released code (its optimiser in float32)."""
        settings = cls(
            words=words,
            order="hops_first",
            step_rule="adam",
            step_size=1e-4,
            stop=0.5,
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
            stop=0.5,
            iterations=1,
            thresholds=0.2,
        )
        return replace(settings, **changes)

    @classmethod
    def attend_and_excite(cls, words: Sequence[Word] | None = None, **changes: Any) -> Vico:
        """The settings of Attend-and-Excite's released code: Vico's score on cross-attention alone, and plain steps.

        There the layers of 1/32 of the image take part (`levels`), and latents of four channels in the scale of Stable
        Diffusion make the step size what it is.
        """
        settings = cls(
            words=words,
            flow="cross",
            step_rule="sgd",
            step_size=20.0,
            stop=0.5,
            iterations={0: 20, 10: 20, 20: 20},
            thresholds={0: 0.95, 10: 0.5, 20: 0.2},
            step_decay=True,
        )
        return replace(settings, **changes)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("flow", self.flow, get_args(FlowForm))
        check_choice("order", self.order, ("tokens_first", "hops_first"))
        check_choice("residual", self.residual, ("average", "add", None))
        check_choice("combine", self.combine, ("mean", "max"))
        check_choice("loss", self.loss, ("min", "variance", *MAP_LOSSES))
        if self.loss in MAP_LOSSES and self.flow == "exact" and self.spatial:
            raise ArgumentError(f"loss={self.loss!r} is of maps, and flow='exact' with spatial=True has none")
        check_choice("step_rule", self.step_rule, STEP_RULES)
        check_number("temperature", self.temperature, above=0)
        check_number("sharpness", self.sharpness, above=0)
        check_number("step_size", self.step_size, 0)
        for name, check in (("iterations", check_count), ("thresholds", check_number)):
            given = getattr(self, name)
            for value in given.values() if isinstance(given, dict) else (given,):
                check(name, value)
            for step in given if isinstance(given, dict) else ():
                check_count(f"a step of {name}", step)
        for name in ("spatial", "normalize", "step_decay"):
            check_flag(name, getattr(self, name))
        self._check_levels()
        if isinstance(self.words, str):
            if self.words not in _WORDS:
                choices = " or ".join(map(repr, _WORDS))
                raise ArgumentError(
                    f"words must be a list of words, a function of the prompt, or {choices}, got {self.words!r}"
                )
        elif self.words is not None and not callable(self.words):
            object.__setattr__(self, "words", checked_words(self.words))
        if isinstance(self.sinks, str):
            check_choice("sinks", self.sinks, ("others",))
        elif self.sinks is not None:
            object.__setattr__(self, "sinks", checked_words(self.sinks, "sinks"))

    def _check_levels(self) -> None:
        if self.levels == "auto":
            return
        levels = self.levels if isinstance(self.levels, (list, tuple)) else ()
        pairs = [tuple(level) for level in levels if isinstance(level, (list, tuple))]
        good = all(len(pair) == 2 and all(is_whole(n, 1) for n in pair) for pair in pairs)
        if not levels or len(pairs) < len(levels) or not good:
            raise ArgumentError(f"levels must be 'auto' or grids (rows, columns), got {self.levels!r}")

    @property
    def idle(self) -> bool:
        """Whether no update is asked for."""
        return super().idle or self.iterations == 0

    def check(self, pipe: VideoPipeline) -> None:
        """Checks that the pipeline has text layers whose maps can be had.

        Raises:
            ArgumentError: if not.
        """
        for denoiser in denoisers_of(pipe):
            check_extra_forwards(denoiser)
            check_undivided(denoiser)
            flow_groups(denoiser, self.flow, self.spatial)

    def before_step(self, call: Call, run: Run) -> torch.Tensor | None:
        """Moves the latents of one denoising step; see `Guidance`."""
        iterations, threshold = self.iterations, self.thresholds
        if isinstance(iterations, dict):
            iterations = iterations.get(call.index, 1)
        if isinstance(threshold, dict):
            threshold = threshold.get(call.index, 0.2)
        if iterations == 0:
            return None
        table = call.sampling.remember((id(self), "table"), lambda: self.table(call))
        table_on_device = table.to(call.latents.device)
        groups = flow_groups(call.denoiser, self.flow, self.spatial)
        pairs = self._pairs(table)
        size = self.step_size
        if self.step_decay:
            size *= math.sqrt(1 - 0.5 * call.index / max(call.count - 1, 1))
        layers = LayerCapture(
            call.denoiser,
            table.ids,
            [group.cross for group in groups],
            [name for group in groups for name in group.temporal],
            [group.spatial for group in groups if group.spatial],
            backend=self.backend,
        )

        def loss_at(z: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            flows = self.token_flows(layers.run(lambda: call.denoise(z)), groups)
            levels = self._peaks(flows, table_on_device)
            call.sampling.remember((id(self), "told"), lambda: self._tell(levels, table_on_device, call))
            scores = self._over_groups([table_on_device.largest_by_word(tokens) for tokens in levels])
            named = [
                dict(zip(labels, row, strict=False)) for labels, row in zip(table.labels, scores.detach(), strict=True)
            ]
            if self.loss not in MAP_LOSSES:
                return fairness_loss(scores, self.loss), {"scores": named}
            each = [MAP_LOSSES[self.loss](table_on_device.by_word(flow), pairs) for flow in flows]
            return torch.stack(each).mean(0), {"scores": named}

        stepper = LatentStepper(self.step_rule, size)
        with layers:
            return descend(call, run, loss_at, stepper, iterations=iterations, threshold=threshold)

    def why_nothing(self, run: Run) -> str | None:
        """Says that there was nothing to do, if that is so."""
        return next(iter(run.notes.get("below threshold", ())), None)

    def table(self, call: Call) -> TokenTable:
        """All tokens of each prompt, and which of them make up each word that is balanced.

        Raises:
            ArgumentError: for a word that is not there, or prompts with different numbers of words.
        """
        words = "content" if self.words is None else self.words
        given: list[Sequence[Word]]
        if isinstance(words, str) or callable(words):
            choose = _WORDS[words] if isinstance(words, str) else words
            given = [checked_words(choose(prompt), "what words returned") for prompt in call.prompts]
        else:
            given = [words] * len(call.prompts)
        spans = call.find(given)
        if len({len(each) for each in spans}) > 1:
            raise ArgumentError(
                "words must be as many for every prompt of a batch; give them, or run the prompts one by one"
            )
        for text, each in zip(call.texts, spans, strict=True):
            beyond = [span.label for span in each if not set(span.ids) <= set(text.ids)]
            if beyond:
                raise ArgumentError(
                    f"words must be words of the prompt, whose flow is balanced, got {', '.join(beyond)}"
                )
        table = TokenTable.of(spans, among=[text.ids for text in call.texts])
        if self.sinks == "others":
            table = replace(table, real=table.membership.any(1))
        elif self.sinks:
            left_out = call.find([self.sinks] * len(call.texts))
            sinks = TokenTable.of(left_out, among=[text.ids for text in call.texts])
            table = replace(table, real=table.real & ~sinks.membership.any(1))
            if not (table.membership.bool() & table.real[:, None]).any(-1).all():
                raise ArgumentError(f"sinks must not hold a whole word of words, got {self.sinks!r}")
        if self.sinks and self.normalize and bool((table.real.sum(1) < 2).any()):
            raise ArgumentError(
                f"sinks must leave the token softmax two tokens at least, got {self.sinks!r}: name more words"
            )
        return table

    def scores(self, maps: dict[str, torch.Tensor], groups: list[Group], table: TokenTable) -> torch.Tensor:
        """Scores A `[B, words]` from the captured maps, differentiable: of each word, that of its strongest token.

        Args:
            maps: layer name → maps, cross `[B, T, F, h, w]` of all prompt tokens, temporal `[B, h·w, F, F]`.
            groups: the graphs.
            table: which tokens are words, on the device of the maps.
        """
        levels = self.token_scores(maps, groups, table)
        return self._over_groups([table.largest_by_word(tokens) for tokens in levels])

    def token_scores(
        self, maps: dict[str, torch.Tensor], groups: list[Group], table: TokenTable
    ) -> list[torch.Tensor]:
        """Scores of all tokens of the prompts, `[B, T]` for each level; see `scores`."""
        return self._peaks(self.token_flows(maps, groups), table)

    def token_flows(self, maps: dict[str, torch.Tensor], groups: list[Group]) -> list[torch.Tensor]:
        """Flow of all tokens of the prompts, `[B, T, F, h, w]` for each level; see `scores`."""
        by_grid: dict[tuple[int, int], list[torch.Tensor]] = {}
        for group in groups:
            rows, columns = maps[group.cross].shape[-2:]
            grid = (rows, columns)
            if self.levels != "auto" and grid not in {tuple(level) for level in self.levels}:
                continue
            flow = flow_of(group, maps, self.flow, self.temperature, self.order, self.residual, self.backend)
            by_grid.setdefault(grid, []).append(flow)
        if not by_grid:
            grids = sorted({tuple(maps[group.cross].shape[-2:]) for group in groups})
            raise ArgumentError(f"levels={self.levels!r} has no layer; the grids there: {grids}")
        return [self._over_groups(flows) for flows in by_grid.values()]

    def _peaks(self, flows: Sequence[torch.Tensor], table: TokenTable) -> list[torch.Tensor]:
        levels = []
        for flow in flows:
            if self.normalize:
                flow = flow.masked_fill(~table.real[:, :, None, None, None], -torch.inf)
                levels.append(token_peaks(flow, sharpness=self.sharpness))
            else:
                levels.append(flow.amax((2, 3, 4)))
        return levels

    def _pairs(self, table: TokenTable) -> list[tuple[int, int]]:
        """Numbers of the words that stand directly before another, and of that; of `"binding"` alone.

        Raises:
            ArgumentError: if the words are too few for the loss of maps, or none stands so, or others in each prompt.
        """
        if self.loss == "separation" and table.present.shape[1] < 2:
            raise ArgumentError(f"loss='separation' needs two words at least, got {', '.join(table.labels[0])}")
        if self.loss != "binding":
            return []
        each = [
            [
                (first, second)
                for first, one in enumerate(spans)
                for second, other in enumerate(spans)
                if max(one) + 1 == min(other)
            ]
            for spans in table.places()
        ]
        if not each[0] or any(pairs != each[0] for pairs in each):
            raise ArgumentError(
                "loss='binding' needs words that hold an attribute directly before what it belongs to, such as 'red' "
                f"and 'circle', the same for every prompt; got {', '.join(table.labels[0])}"
            )
        return each[0]

    def _over_groups(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack(tuple(values))
        return stacked.mean(0) if self.combine == "mean" else stacked.amax(0)

    def _tell(self, levels: list[torch.Tensor], table: TokenTable, call: Call) -> None:
        """Warns, once a run, if tokens of no balanced word have taken the whole of the token softmax at every
        level.
        """
        if not self.normalize:
            return
        balanced = table.membership.any(1)
        tokens = torch.stack(levels).detach()  # [levels, B, T]
        others, places = tokens.masked_fill(balanced, 0).max(-1)
        words = tokens.masked_fill(~balanced, 0).amax(-1)
        for sample in ((others > 0.9) & (words < 0.1)).all(0).nonzero()[:1, 0].tolist():
            labels = {span.ids[0]: span.label for span in call.texts[sample].all_words()}
            taken = {int(table.ids[sample, place]) for place in places[:, sample]}
            warnings.warn(
                f"Vico's score is saturated: {' and '.join(repr(labels[id]) for id in sorted(taken))} took at least "
                f"{float(others[:, sample].min()):.0%} of the token softmax, and no balanced word has more than "
                f"{float(words[:, sample].max()):.0%}: leave such words out with sinks=[…] or sinks='others'",
                GuidanceWarning,
                stacklevel=2,
            )


#: What `words` may name instead of listing them.
_WORDS: dict[str, Callable[[str], Sequence[Word]]] = {"content": content_words, "nouns_and_verbs": nouns_and_verbs}
