"""`cvg-kernels scenes eval`: what guidance methods do to each kind of failure, on the same prompts and seeds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cvg_kernels.intervals import mean, paired_differences
from cvg_kernels.processes import Place, gather
from cvg_kernels.prompts.words import content_words, nouns_and_verbs
from cvg_kernels.scenes.captions import Caption, random_things
from cvg_kernels.scenes.kept import Judged, KeptClips, key_of
from cvg_kernels.scenes.oracle import look
from cvg_kernels.scenes.pipeline import sample
from cvg_kernels.scenes.verdict import judge
from cvg_kernels.scenes.world import DIRECTIONS, RELATIONS, TRAVEL

#: What prompts ask for: several things, how two stand, how many there are, how they move.
KINDS = ("things", "relation", "number", "motion")
#: All kinds of prompts together, in reports.
ALL = "all"
_BATCH = 8
_ALONE = Place()


def prompts_of(kind: str, count: int, seed: int) -> list[Caption]:
    """Draws prompts of one kind, pairs that training never shows among them.

    Args:
        kind: one of `KINDS`. `things`: two to four. `relation`: two, and how they stand. `number`: two or three alike.
            `motion`: two, each with direction and speed.
        count: how many.
        seed: random seed of the draw.
    """
    rng = np.random.default_rng((seed, 7, KINDS.index(kind)))
    found: list[Caption] = []
    while len(found) < count:
        things = random_things(rng, {"things": 2 + len(found) % 3, "number": 1}.get(kind, 2), held_out=None)
        if len({thing.shape for thing in things}) < len(things):
            continue
        if kind == "relation":
            found.append(Caption(things, str(rng.choice(RELATIONS))))
        elif kind == "number":
            found.append(Caption((dataclasses.replace(things[0], count=2 + int(rng.integers(2))),)))
        elif kind == "motion":
            found.append(Caption(tuple(_moving(rng, thing) for thing in things)))
        else:
            found.append(Caption(things))
    return found


def _moving(rng: np.random.Generator, thing):
    return dataclasses.replace(thing, direction=str(rng.choice(list(DIRECTIONS))), speed=str(rng.choice(list(TRAVEL))))


def judge_prompts(
    pipe: Any,
    prompts: Sequence[Caption],
    seed: int,
    guidance: Any = None,
    progress: Callable[[int], None] = lambda done: None,
    place: Place = _ALONE,
    kept: KeptClips | None = None,
    **options: Any,
) -> list[Judged]:
    """Makes a clip for each prompt and judges it; several processes share them, and each returns all.

    Args:
        pipe: the scenes pipeline.
        prompts: one a clip.
        seed: clip number i starts from the noise of seed · 1 000 003 + i.
        guidance: a method or `None`.
        progress: called with the number of clips made, by all processes as far as this one can tell.
        place: which of the processes this one is.
        kept: clips of earlier evaluations, which are not made again, and where those made now are kept.
        **options: options of `shapes.pipeline.sample`.

    Returns:
        The clips in the order of the prompts.
    """
    kept = KeptClips() if kept is None else kept
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    made_with = key_of(networks, guidance, options)
    mine: dict[int, Judged] = {}
    for numbers in _batches(prompts)[place.rank :: place.count]:
        part = [prompts[number] for number in numbers]
        seeds = [seed * 1_000_003 + number for number in numbers]
        keys = [key_of(made_with, start, str(prompt)) for start, prompt in zip(seeds, part, strict=True)]
        known = {number: kept[key] for number, key in zip(numbers, keys, strict=True)}
        if None in known.values():
            began = time.perf_counter()
            clips = sample(pipe, list(map(str, part)), seeds, guidance=guidance, **options)
            seconds = (time.perf_counter() - began) / len(part)
            for number, key, clip, prompt in zip(numbers, keys, clips, part, strict=True):
                known[number] = Judged(judge(look(clip), prompt), _change(clip), seconds)
                kept.add(key, known[number], prompt=str(prompt), seed=seed, guidance=str(guidance))
        mine |= {number: clip for number, clip in known.items() if clip is not None}
        progress(min(len(mine) * place.count, len(prompts)))
    clips = {number: one for each in gather(mine, place) for number, one in each.items()}
    return [clips[number] for number in range(len(prompts))]


def _batches(prompts: Sequence[Caption]) -> list[list[int]]:
    """Numbers of prompts that are run together: methods ask for as many words in every prompt of a batch."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        words = [len(words_of(str(prompt))) for words_of in (content_words, nouns_and_verbs)]
        alike.setdefault((len(prompt.things), *words), []).append(number)
    return [group[at : at + _BATCH] for group in alike.values() for at in range(0, len(group), _BATCH)]


def _change(clip: torch.Tensor) -> float:
    return float((clip[1:] - clip[:-1]).abs().mean()) if len(clip) > 1 else 0.0


def evaluate(
    pipe: Any,
    methods: dict[str, Any],
    *,
    model: str,
    prompts: int,
    seed: int,
    kinds: Sequence[str] = KINDS,
    progress: Callable[[str, int], None] = lambda name, done: None,
    place: Place = _ALONE,
    kept: KeptClips | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores methods on every kind of prompt, with the same prompts and seeds.

    Args:
        pipe: the scenes pipeline.
        methods: name → method, `None` for the untouched model.
        model: what is written as the model's name.
        prompts: how many of each kind.
        seed: random seed of prompts and noise. Reported results use 0; settings are chosen on others.
        kinds: some of `KINDS`.
        progress: called with the method's name and the number of clips that it has made.
        place: which of the processes this one is.
        kept: as for `judge_prompts`.
        **options: options of `shapes.pipeline.sample`.

    Returns:
        model, prompts, seed, and by kind and method: the means of `Judged.scores` over the clips with their 95 %
        intervals, `seconds_per_clip`, and from the second method on the paired differences to the first; for several
        kinds also of `ALL` together.
    """
    together = (*kinds, ALL) if len(kinds) > 1 else tuple(kinds)
    found: dict[str, dict[str, Any]] = {kind: {} for kind in together}
    first: dict[str, dict[str, list[float | None]]] = {}
    for name, method in methods.items():
        clips: dict[str, list[Judged]] = {}
        for number, kind in enumerate(kinds):
            told = lambda done, name=name, number=number: progress(name, number * prompts + done)
            asked = prompts_of(kind, prompts, seed)
            clips[kind] = judge_prompts(pipe, asked, seed, method, told, place, kept, **options)
        clips[ALL] = [clip for kind in kinds for clip in clips[kind]]
        for kind in together:
            scores = [clip.scores() for clip in clips[kind]]
            by_score = {score: [one[score] for one in scores] for score in scores[0]}
            entry: dict[str, Any] = {score: mean(values) for score, values in by_score.items()}
            entry["seconds_per_clip"] = sum(clip.seconds for clip in clips[kind]) / len(clips[kind])
            if kind in first:
                entry["against_first"] = paired_differences(first[kind], by_score)
            else:
                first[kind] = by_score
            found[kind][name] = entry
    return {"model": model, "prompts": prompts, "seed": seed, "kinds": found}


def print_report(report: dict[str, Any]) -> None:
    """Prints a table for each way that things end: a row for each method, a column for each kind of prompt.

    Below the first method stand differences to it; an asterisk marks those whose interval leaves out zero. What never
    happened has no table.
    """
    kinds = report["kinds"]
    first, *others = next(iter(kinds.values()))
    print(f"{report['prompts']} prompts of each kind, seed {report['seed']}, {report['model']}; %, 95 % intervals")
    for number, name in enumerate((first, *others)):
        print(f"{number:3d}  {name}")
    for score in next(iter(kinds.values()))[first]:
        entries = {kind: {name: entry[score] for name, entry in kinds[kind].items()} for kind in kinds}
        if score == "seconds_per_clip" or not any(e["mean"] for each in entries.values() for e in each.values()):
            continue
        print()
        _print_row(score, list(kinds))
        _print_row("  0", [_mean_cell(entries[kind][first]) for kind in kinds])
        for number, name in enumerate(others, 1):
            _print_row(f"{number:3d}", [_difference_cell(kinds[kind][name]["against_first"][score]) for kind in kinds])


def _print_row(head: str, cells: Sequence[str]) -> None:
    print("".join([head.ljust(14), *(cell.ljust(25) for cell in cells)]).rstrip())


def _mean_cell(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return "–"
    low, high = entry["ci95"]
    return f"{100 * entry['mean']:5.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _difference_cell(entry: dict[str, Any]) -> str:
    if entry["difference"] is None:
        return "–"
    low, high = entry["ci95"]
    star = "*" if low > 0 or high < 0 else ""
    return f"{100 * entry['difference']:+5.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{star}"
