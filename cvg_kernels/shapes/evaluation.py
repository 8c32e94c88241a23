"""`cvg-kernels shapes eval`: what guidance methods do to two-object prompts, read by the oracle."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cvg_kernels.intervals import mean, paired_differences, rate
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.processes import Place, gather
from cvg_kernels.shapes.oracle import Verdict, compare, frame_consistency, look
from cvg_kernels.shapes.pipeline import sample
from cvg_kernels.shapes.quality import encoder_features, encoder_frechet, object_distance, real_clips, reconstruct
from cvg_kernels.shapes.world import FRAMES, HELD_OUT, Thing, caption, random_things

CLASSES = ("present", "bound", "direction", "all_right")
_BATCH = 10
_ALONE = Place()


def two_object_prompts(count: int, seed: int) -> list[tuple[Thing, ...]]:
    """Prompts of two things that differ in colour and in shape, from all pairs, held-out ones included.

    Args:
        count: how many.
        seed: random seed of the draw. Reported results use seed 0; hyper-parameters were chosen on others.
    """
    rng = np.random.default_rng((seed, 4))
    return [random_things(rng, 2, held_out=None, distinct_shapes=True) for _ in range(count)]


@dataclass(frozen=True)
class Judged:
    """What was read of the clips of some prompts, in their order.

    Attributes:
        verdicts: what the oracle says of each clip.
        consistencies: agreement of neighbouring frames, clip by clip.
        distances: how far the objects found are from clean renderings, see `quality.object_distance`.
        features: `[B, D]`, see `quality.encoder_features`.
        seconds: to make a clip; judging left out.
    """

    verdicts: list[Verdict]
    consistencies: list[float]
    distances: list[float | None]
    features: torch.Tensor
    seconds: float


def judge_clips(
    pipe: VideoPipeline,
    things: Sequence[Sequence[Thing]],
    seed: int,
    guidance: Any = None,
    progress: Callable[[int], None] = lambda done: None,
    place: Place = _ALONE,
    **options: Any,
) -> Judged:
    """Makes and judges a clip for each prompt; several processes share them, and each returns what all have made.

    Args:
        pipe: the shapes pipeline.
        things: the prompts.
        seed: clip number i starts from the noise of seed · 1 000 003 + i.
        guidance: a method or `None`.
        progress: called with the number of clips made, by all processes as far as this one can tell.
        place: which of the processes this one is.
        **options: options of `pipeline.sample`.
    """
    mine, count = {}, 0
    # Whole batches are shared, so that each is the same whoever makes it.
    for start in range(place.rank * _BATCH, len(things), place.count * _BATCH):
        part = things[start : start + _BATCH]
        seeds = [seed * 1_000_003 + start + number for number in range(len(part))]
        began = time.perf_counter()
        clips = sample(pipe, [caption(each) for each in part], seeds, guidance=guidance, **options)
        seconds = time.perf_counter() - began
        seen = [look(clip) for clip in clips]
        mine[start] = Judged(
            [compare(found, each) for found, each in zip(seen, part, strict=True)],
            [frame_consistency(clip) for clip in clips],
            [object_distance(clip, found) for clip, found in zip(clips, seen, strict=True)],
            encoder_features(pipe.vae, clips),
            seconds,
        )
        count += len(part)
        progress(min(count * place.count, len(things)))
    batches = {start: one for each in gather(mine, place) for start, one in each.items()}
    progress(len(things))
    return _joined([batches[start] for start in sorted(batches)])


def _joined(batches: Sequence[Judged]) -> Judged:
    """Batches, whose seconds are of all their clips, one after the other."""
    verdicts = [verdict for one in batches for verdict in one.verdicts]
    return Judged(
        verdicts,
        [value for one in batches for value in one.consistencies],
        [value for one in batches for value in one.distances],
        torch.cat([one.features for one in batches]),
        sum(one.seconds for one in batches) / len(verdicts),
    )


def evaluate(
    pipe: VideoPipeline,
    methods: dict[str, Any],
    *,
    model: str,
    prompts: int,
    seed: int,
    progress: Callable[[str, int], None] = lambda name, done: None,
    place: Place = _ALONE,
    **options: Any,
) -> dict[str, Any]:
    """Scores methods on the same prompts and seeds; several processes share the clips, and each returns the report.

    Args:
        pipe: the shapes pipeline.
        methods: name → method, `None` for the untouched model.
        model: what is written as the model's name.
        prompts: how many two-object prompts.
        seed: random seed of prompts and noise.
        progress: called with method and number of clips made.
        place: which of the processes this one is.
        **options: options of `pipeline.sample`.

    Returns:
        model, prompts, seed, processes; `real`, the image quality of real clips of the prompts through the
        autoencoder, the best that is possible; and per method the rates of `present`, `bound`, `direction` and
        `all_right` with 95 % intervals, the mean `consistency` of neighbouring frames, the image quality
        (`object_distance`, `encoder_frechet`), `seconds_per_clip`, the rates on prompts with and without a held-out
        pair, and (from the second method on) the paired differences to the first.
    """
    things = two_object_prompts(prompts, seed)
    unseen = [any((t.colour, t.shape) in HELD_OUT for t in each) for each in things]
    frames = options.get("frames", FRAMES)
    real = encoder_features(pipe.vae, real_clips(things, seed, frames=frames))
    report: dict[str, Any] = {"model": model, "prompts": prompts, "seed": seed}
    report["processes"] = place.count
    best = reconstruct(pipe.vae, real_clips(things, seed, draw=1, frames=frames))
    report["real"] = {
        "object_distance": mean([object_distance(clip, look(clip)) for clip in best]),
        "encoder_frechet": encoder_frechet(encoder_features(pipe.vae, best), real),
    }
    report["guidance"] = {}
    first: dict[str, list[Any]] | None = None
    for name, method in methods.items():
        told = lambda done, name=name: progress(name, done)
        judged = judge_clips(pipe, things, seed, method, told, place, **options)
        table = [asdict(verdict) for verdict in judged.verdicts]
        entry: dict[str, Any] = {kind: rate([row[kind] for row in table]) for kind in CLASSES}
        entry["consistency"] = mean(judged.consistencies)
        entry["object_distance"] = mean(judged.distances)
        entry["encoder_frechet"] = encoder_frechet(judged.features, real)
        entry["seconds_per_clip"] = judged.seconds
        for label, wanted in (("trained_pairs", False), ("held_out_pairs", True)):
            rows = [row for row, new in zip(table, unseen, strict=True) if new == wanted]
            entry[label] = {kind: rate([row[kind] for row in rows]) for kind in CLASSES}
        per_clip = {kind: [row[kind] for row in table] for kind in CLASSES} | {
            "consistency": judged.consistencies,
            "object_distance": judged.distances,
        }
        if first is None:
            first = per_clip
        else:
            entry["against_first"] = paired_differences(first, per_clip)
        report["guidance"][name] = entry
    return report


def print_report(report: dict[str, Any]) -> None:
    """Prints the rates and the image quality as a table."""
    print(f"{report['prompts']} two-object prompts, seed {report['seed']}, {report['model']}; 95 % intervals")
    width = max(10, *map(len, report["guidance"]))
    plain = ("consistency", "object_distance", "encoder_frechet", "s/clip")
    print("  ".join(["method".ljust(width), *(kind.ljust(18) for kind in CLASSES), *plain]))
    for name, entry in {**report["guidance"], "real clips": report["real"]}.items():
        cells = [_rate_cell(entry.get(kind)).ljust(18) for kind in CLASSES]
        figures = (
            entry.get("consistency", {}).get("mean"),
            entry["object_distance"]["mean"],
            entry["encoder_frechet"]["value"],
            entry.get("seconds_per_clip"),
        )
        cells += [
            ("–" if figure is None else f"{figure:.{digits}f}").ljust(len(kind))
            for figure, digits, kind in zip(figures, (3, 3, 3, 2), plain, strict=True)
        ]
        print("  ".join([name.ljust(width), *cells]))


def _rate_cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    low, high = found["ci95"]
    return f"{found['rate']:6.1%} [{low:.0%}, {high:.0%}]"
