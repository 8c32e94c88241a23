"""`cvg-kernels shapes eval`: what guidance methods do to two-object prompts, read by the oracle."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cvg_kernels.shapes.oracle import Verdict, frame_consistency, judge
from cvg_kernels.shapes.pipeline import sample
from cvg_kernels.shapes.world import HELD_OUT, Thing, caption, random_things

CLASSES = ("present", "bound", "direction", "all_right")
_BATCH = 10


def two_object_prompts(count: int, seed: int) -> list[tuple[Thing, Thing]]:
    """Prompts of two things that differ in colour and in shape, from all pairs, held-out ones included.

    Args:
        count: how many.
        seed: of the draw. Reported results use seed 0; hyper-parameters were chosen on others.
    """
    rng = np.random.default_rng((seed, 4))
    return [random_things(rng, 2, held_out=None, distinct_shapes=True) for _ in range(count)]


def wilson(successes: int, count: int) -> list[float]:
    """The 95 % Wilson score interval of a rate."""
    if count == 0:
        return [0.0, 1.0]
    z, rate = 1.959964, successes / count
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def rate(values: Sequence[bool]) -> dict[str, Any]:
    """A rate with its interval and the number it stands on."""
    hits = sum(values)
    return {"rate": hits / max(len(values), 1), "ci95": wilson(hits, len(values)), "n": len(values)}


def paired_difference(one: Sequence[bool], other: Sequence[bool]) -> dict[str, Any]:
    """Other − one over the same prompts and seeds, with the 95 % normal interval of paired differences."""
    differences = np.array(other, float) - np.array(one, float)
    mean = float(differences.mean())
    half = 1.959964 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return {"difference": mean, "ci95": [mean - half, mean + half]}


def mean(values: Sequence[float]) -> dict[str, Any]:
    """A mean with its 95 % normal interval and the number it stands on."""
    middle = float(np.mean(values))
    half = 1.959964 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": middle, "ci95": [middle - half, middle + half], "n": len(values)}


def judge_clips(
    pipe: Any,
    things: Sequence[Sequence[Thing]],
    seed: int,
    guidance: Any = None,
    progress: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> tuple[list[Verdict], list[float], float]:
    """Makes a clip for each prompt; returns verdicts, frame consistencies, and seconds per clip (judging left out).

    Args:
        pipe: the shapes pipeline.
        things: the prompts.
        seed: clip number i starts from the noise of seed · 1 000 003 + i.
        guidance: a method or `None`.
        progress: called with the number of clips made.
        **options: of `pipeline.sample`.
    """
    verdicts, consistencies, seconds = [], [], 0.0
    for start in range(0, len(things), _BATCH):
        part = things[start : start + _BATCH]
        seeds = [seed * 1_000_003 + start + at for at in range(len(part))]
        began = time.perf_counter()
        clips = sample(pipe, [caption(each) for each in part], seeds, guidance=guidance, **options)
        seconds += time.perf_counter() - began
        verdicts += [judge(clip, each) for clip, each in zip(clips, part, strict=True)]
        consistencies += [frame_consistency(clip) for clip in clips]
        progress(len(verdicts))
    return verdicts, consistencies, seconds / max(len(things), 1)


def evaluate(
    pipe: Any,
    methods: dict[str, Any],
    *,
    model: str,
    prompts: int,
    seed: int,
    progress: Callable[[str, int], None] = lambda name, done: None,
    **options: Any,
) -> dict[str, Any]:
    """Scores methods on the same prompts and seeds.

    Args:
        pipe: the shapes pipeline.
        methods: name → method, `None` for the untouched model.
        model: what is written as the model's name.
        prompts: how many two-object prompts.
        seed: of prompts and noise.
        progress: called with method and number of clips made.
        **options: of `pipeline.sample`.

    Returns:
        model, prompts, seed, and per method the rates of `present`, `bound`, `direction` and `all_right` with 95 %
        intervals, the mean `consistency` of neighbouring frames, `seconds_per_clip`, the rates on prompts with and without
        a held-out pair, and (from the second method on) the paired differences to the first.
    """
    things = two_object_prompts(prompts, seed)
    unseen = [any((t.colour, t.shape) in HELD_OUT for t in each) for each in things]
    report: dict[str, Any] = {"model": model, "prompts": prompts, "seed": seed, "guidance": {}}
    first: tuple[list[dict[str, bool]], list[float]] | None = None
    for name, method in methods.items():
        verdicts, consistencies, seconds = judge_clips(
            pipe, things, seed, method, lambda done, name=name: progress(name, done), **options
        )
        table = [asdict(verdict) for verdict in verdicts]
        entry: dict[str, Any] = {kind: rate([row[kind] for row in table]) for kind in CLASSES}
        entry["consistency"] = mean(consistencies)
        entry["seconds_per_clip"] = seconds
        for label, wanted in (("trained_pairs", False), ("held_out_pairs", True)):
            rows = [row for row, new in zip(table, unseen, strict=True) if new == wanted]
            entry[label] = {kind: rate([row[kind] for row in rows]) for kind in CLASSES}
        if first is None:
            first = table, consistencies
        else:
            entry["against_first"] = {
                kind: paired_difference([r[kind] for r in first[0]], [r[kind] for r in table])
                for kind in CLASSES
            } | {"consistency": paired_difference(first[1], consistencies)}
        report["guidance"][name] = entry
    return report


def print_report(report: dict[str, Any]) -> None:
    """Prints the rates as a table."""
    print(
        f"{report['prompts']} two-object prompts, seed {report['seed']}, {report['model']}; 95 % intervals"
    )
    width = max(10, *map(len, report["guidance"]))
    print(
        "  ".join(
            ["method".ljust(width), *(kind.ljust(18) for kind in CLASSES), "consistency", "s/clip"]
        )
    )
    for name, entry in report["guidance"].items():
        cells = [
            f"{entry[kind]['rate']:6.1%} [{entry[kind]['ci95'][0]:.0%}, {entry[kind]['ci95'][1]:.0%}]".ljust(
                18
            )
            for kind in CLASSES
        ]
        cells.append(f"{entry['consistency']['mean']:.3f}".ljust(11))
        print("  ".join([name.ljust(width), *cells, f"{entry['seconds_per_clip']:.2f}"]))
