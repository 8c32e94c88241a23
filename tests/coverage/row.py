"""A tiny pipeline, its stock run, and what was seen in it: made once, and shared by all checks of one row of the
table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from tests.coverage import oracle
from tests.coverage.facts import DECODED, MIXERS, OWN_SCHEDULER, grids_of, video_begins
from tests.pipeline.snapshot import Snapshot
from tests.pipelines import PIPELINES, PipelineCase, denoisers, run

WORDS = ["cat", "blue dog"]  # of the prompt; the second has two tokens


@dataclass(frozen=True)
class Wanted:
    """The map of a layer at one evaluation of the prompt's branch.

    Attributes:
        step: of the run, as the denoiser's calls count them.
        layer: dotted path.
        maps: `[words, F·h·w]`, float64.
    """

    step: int
    layer: str
    maps: torch.Tensor


class Row:
    """What is known of a tiny pipeline, all of it by the oracle.

    Args:
        case: which.
        config: what of its denoiser's configuration is changed.
    """

    def __init__(self, case: PipelineCase, config: dict[str, Any]) -> None:
        self.case = case
        self.mixers = MIXERS.get(case.denoiser)
        self.pipe, self.options = case.build()
        if config:
            _rebuild(self.pipe, config)
        if case.name not in DECODED:
            self.options["output_type"] = "latent"
        self.scheduler = self.pipe.scheduler
        self.networks = [oracle.network_of(denoiser) for denoiser in denoisers(self.pipe)]
        mixing = oracle.mixing(self.pipe, self.mixers)
        with oracle.watched(self.networks, mixing=mixing) as self.watch:
            self.stock = self.run()
        self.grids = grids_of(case)
        self.before = Snapshot(self.pipe)

    @classmethod
    def of(cls, name: str, **config: Any) -> Row:
        return cls(PIPELINES[name], config)

    def run(self, **changes: Any) -> torch.Tensor:
        """A run from the same noise."""
        try:
            return run(self.pipe, self.options, **changes)
        finally:
            if self.case.name in OWN_SCHEDULER:
                self.pipe.scheduler = self.scheduler

    def restored(self) -> None:
        """Asserts that nothing is left on the pipeline."""
        self.before.check(self.pipe)

    # -- the prompt's branch

    @property
    def each(self) -> int:
        """Calls of the denoiser that make one evaluation of all branches."""
        return 1 if self.case.batched else len(self.case.branches)

    @property
    def first(self) -> int:
        """Number of the first call that is given the prompt."""
        return 0 if self.case.batched else self.case.branches.index("cond")

    @property
    def prompted(self) -> list[int]:
        """Numbers of all calls that are given the prompt."""
        calls = range(self.first, len(self.watch.calls), self.each)
        if not self.case.extra_calls:
            return list(calls)
        # calls after which nothing steps, of clean latents
        return [call for call in calls if self.watch.calls[call].arguments["timestep"].any()]

    def rows(self, batch: int) -> slice:
        """Those of the prompt's branch in a batch."""
        branches = self.case.branches
        if not self.case.batched or batch == 1:  # Mochi's layers see a sample at a time
            return slice(0, batch)
        each, at = batch // len(branches), branches.index("cond")
        return slice(at * each, (at + 1) * each)

    @cached_property
    def places(self) -> oracle.Places:
        found = oracle.places(self.pipe, self.run, self.watch, self.first, WORDS, self.mixers)
        # LTX 2's sound attends to the text too
        return replace(found, layers=[at for at in found.layers if "audio" not in at[0]])

    # -- what attention to the words is

    @property
    def kind(self) -> str:
        """How the video attends to the text, in words."""
        seen = self.watch.of_call(self.first)[self.places.layers[0]]
        keys = seen.key.shape[2]
        if self.places.joint:
            video = math.prod(next(iter(self.grids)))
            begin = video_begins(self.case, keys, video)
            first = max(at for word in self.places.words for at in word) < begin
            return f"joint, the text {'first' if first else 'last'}"
        by_frame = seen.query.shape[0] > self.watch.calls[self.first].latents.shape[0]
        return "cross, in each frame" if by_frame else "cross, over the video"

    def videos(self, maps: torch.Tensor) -> torch.Tensor:
        """Of maps `[B', words, queries]` the branch's, and of its queries the video's: `[words, F·h·w]`."""
        maps = maps[self.rows(len(maps))]
        tokens = {math.prod(grid) for grid in self.grids}
        together = maps.transpose(0, 1).flatten(1)  # the frames may be samples of a batch
        if not self.places.joint:
            assert together.shape[1] in tokens, (self.case.name, together.shape, tokens)
            return together
        (video,) = tokens
        begin = video_begins(self.case, together.shape[1], video)
        assert not any(begin <= at < begin + video for word in self.places.words for at in word)
        return together[:, begin : begin + video]

    def seen_maps(self, watch: oracle.Watch, call: int) -> list[tuple[str, torch.Tensor]]:
        """Every layer's attention to the words in one call of the denoiser."""
        seen = watch.of_call(call)
        return [(name, self.videos(seen[name, number].maps(self.places.words))) for name, number in self.places.layers]

    @cached_property
    def wanted(self) -> list[Wanted]:
        """All maps of the stock run, in the order in which they were made."""
        case = self.case
        steps = case.denoising_steps(self.options.get("num_inference_steps", 3)) // case.rounds
        return [
            Wanted(number % steps, layer, maps)
            for number, call in enumerate(self.prompted)
            for layer, maps in self.seen_maps(self.watch, call)
        ]


def _rebuild(pipe: Any, config: dict[str, Any]) -> None:
    """Gives a pipeline another transformer of the same class, of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        changed = {**pipe.transformer.config, **config}
        pipe.transformer = type(pipe.transformer).from_config(changed).eval()


def answers(row: Row, watch: oracle.Watch) -> float:
    """How far the denoiser's answers of a run are from those of the stock run, relative to the largest of each.

    Only as far as they follow from the same latents: of the first step.
    """
    assert len(watch.calls) == len(row.watch.calls)
    worst = 0.0
    for call in range(row.each):
        here, stock = watch.calls[call].output, row.watch.calls[call].output
        worst = max(worst, float((here - stock).abs().max() / stock.abs().max()))
    return worst


def same_video(row: Row, video: torch.Tensor) -> None:
    """Asserts that a video is the stock one but for rounding, which the steps multiply."""
    assert video.shape == row.stock.shape
    assert float((video - row.stock).abs().max()) <= 1e-3 * float(row.stock.abs().max())
