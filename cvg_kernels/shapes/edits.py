"""`cvg-kernels shapes edits`: what the editor does to clips of the shapes world,
against what one would do without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cvg_kernels.environment import versions
from cvg_kernels.intervals import mean, paired_differences
from cvg_kernels.processes import Place, gather
from cvg_kernels.shapes.edit_arms import STRUCTURE, Arm, content_arms, level_arms, sdedit_arms, temporal_arms
from cvg_kernels.shapes.edit_tasks import SCORES, EditTask, EditVerdict, edit_tasks, judge_edits

#: The editor as it is used: the prompt, and the structure of all comparisons that are not about the level.
PLAIN = f"Gen-1, structure {STRUCTURE}"
KINDS = (*SCORES, "distance", "consistency")
_BATCH = 10
_ALONE = Place()


@dataclass(frozen=True)
class Group:
    """Arms on the same tasks.

    Attributes:
        tasks: what is asked for.
        arms: name → how it is made.
    """

    tasks: Sequence[EditTask]
    arms: Mapping[str, Arm]


def run_arm(
    arm: Arm,
    tasks: Sequence[EditTask],
    seed: int,
    place: Place = _ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[EditVerdict], float]:
    """Makes and judges the edits of an arm; several processes share them, and each returns what all have made.

    Args:
        arm: how they are made.
        tasks: what is asked for.
        seed: task i starts from the noise of seed · 1 000 003 + i.
        place: place of this process.
        progress: called with the number of edits made.

    Returns:
        A verdict a task, and the seconds an edit took.
    """
    mine = {}
    # Whole batches are shared, so that each is the same whoever makes it.
    for start in range(place.rank * _BATCH, len(tasks), place.count * _BATCH):
        part = tasks[start : start + _BATCH]
        seeds = [seed * 1_000_003 + start + number for number in range(len(part))]
        began = time.perf_counter()
        frames = arm(part, seeds)
        mine[start] = judge_edits(frames.float().cpu(), part), time.perf_counter() - began
        progress(min((len(mine)) * _BATCH * place.count, len(tasks)))
    results = {start: one for each in gather(mine, place) for start, one in each.items()}
    progress(len(tasks))
    verdicts = [verdict for start in sorted(results) for verdict in results[start][0]]
    return verdicts, sum(seconds for _, seconds in results.values()) / len(tasks)


def groups(
    pipe: Any,
    world: Any,
    *,
    edits: int,
    seed: int,
    diffusion_prior: Any = None,
    prior_scheduler: Any = None,
    denoisers: Mapping[str, Any] | None = None,
) -> dict[str, Group]:
    """All that is measured.

    Args:
        pipe: the editor.
        world: the shapes pipeline, for SDEdit.
        edits: clips an arm.
        seed: random seed of clips and noise.
        diffusion_prior: a prior of the other kind, to compare.
        prior_scheduler: its noise schedule.
        denoisers: name → a denoiser trained otherwise, to compare.
    """
    one = edit_tasks(edits, seed)
    two = edit_tasks(edits, seed, things=2)
    new = edit_tasks(edits, seed, held_out=True)
    levels = level_arms(pipe)
    gen1 = {PLAIN: levels[f"structure={STRUCTURE}"]}
    found = {
        "structure": Group(one, gen1 | levels),
        "content": Group(one, gen1 | content_arms(pipe, diffusion_prior, prior_scheduler)),
        "time": Group(one, gen1 | temporal_arms(pipe)),
        "SDEdit": Group(one, gen1 | sdedit_arms(world)),
        "two things": Group(two, gen1),
        "pairs never seen": Group(new, gen1),
    }
    if denoisers:
        trained = {
            f"{name}, {kind}": _with_denoiser(pipe, denoiser, arm)
            for name, denoiser in denoisers.items()
            for kind, arm in {"plain": gen1[PLAIN], **temporal_arms(pipe, (1.5,))}.items()
        }
        found["training"] = Group(one, trained)
    return found


def _with_denoiser(pipe: Any, denoiser: Any, arm: Arm) -> Arm:
    def run(tasks: Sequence[EditTask], seeds: Sequence[int]) -> torch.Tensor:
        own = pipe.unet
        pipe.register_modules(unet=denoiser)
        try:
            return arm(tasks, seeds)
        finally:
            pipe.register_modules(unet=own)

    return run


def evaluate_edits(
    measured: Mapping[str, Group],
    *,
    model: str,
    seed: int,
    place: Place = _ALONE,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> dict[str, Any]:
    """Scores all arms.

    Args:
        measured: the result of `groups`.
        model: what is written as the model's name.
        seed: random seed of clips and noise.
        place: place of this process.
        progress: called with an arm's name and the number of edits made.

    Returns:
        model, seed, processes, `input` (the scores of the clips themselves), and per group and arm the means of
        `colour`, `shape`, `direction`, `found`, `distance` (of those found) and `consistency` with 95 % intervals,
        `seconds_per_edit`, and the paired differences to the first arm of the group (`minus_first`).
    """
    first = next(iter(measured.values())).tasks
    report: dict[str, Any] = {"model": model, "seed": seed, "edits": len(first)}
    report |= {"structure": STRUCTURE, "processes": place.count, "versions": versions()}
    report["input"] = _means(_table(judge_edits([task.clip for task in first], first)))
    report["groups"] = {}
    known: dict[tuple[int, int], tuple] = {}  # an arm that stands in several groups runs once
    for group, content in measured.items():
        tables: dict[str, dict[str, list]] = {}
        report["groups"][group] = entries = {}
        for name, arm in content.arms.items():
            key = id(content.tasks), id(arm)
            if key not in known:
                told = lambda done, name=name: progress(name, done)
                known[key] = run_arm(arm, content.tasks, seed, place, told)
            verdicts, seconds = known[key]
            progress(name, len(content.tasks))
            tables[name] = _table(verdicts)
            entries[name] = _means(tables[name]) | {"seconds_per_edit": seconds}
            if len(tables) > 1:
                base = next(iter(tables.values()))
                entries[name]["minus_first"] = paired_differences(base, tables[name])
    return report


def _table(verdicts: Sequence[EditVerdict]) -> dict[str, list]:
    return {kind: [getattr(verdict, kind) for verdict in verdicts] for kind in KINDS}


def _means(table: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    return {kind: mean(values) for kind, values in table.items()}


def print_edits(report: dict[str, Any]) -> None:
    """Prints the scores as a table; a star marks what differs from the first of its group,
    the interval excluding 0.
    """
    print(
        f"{report['edits']} edits an arm, seed {report['seed']}, {report['model']}; means with 95 % intervals;"
        " * differs from the first of its group, the interval of the paired difference excludes 0"
    )
    width = max(len(name) for group in report["groups"].values() for name in group)
    for group, entries in {"input": {"the clips": report["input"]}, **report["groups"]}.items():
        print("  ".join([f"— {group}".ljust(width), *(kind.ljust(20) for kind in KINDS), "s/edit"]))
        for name, entry in entries.items():
            cells = [_cell(entry, kind).ljust(20) for kind in KINDS]
            seconds = entry.get("seconds_per_edit")
            cells.append("" if seconds is None else f"{seconds:.2f}")
            print("  ".join([name.ljust(width), *cells]))
    for name, found in report.get("encoders", {}).get("retrieval", {}).items():
        right = ", ".join(f"{kind} {found[kind]['rate']:.1%}" for kind in ("text", "prior"))
        print(f"retrieval of {name} among {found['captions']} captions: {right}")
    if "encoders" in report:
        error = report["encoders"]["depth_error"]
        told = ", ".join(f"{error[kind]['mean']:.4f} ({kind})" for kind in error)
        print(f"error of depth, of 1 for the nearest: {told}")
    if "cvg" in report:
        found = report["cvg"]
        low, high = found["difference"]["ci95"]
        print(
            f"direction that the prompt asks for, structure 7: {found['without']['rate']:.1%}, with CVG "
            f"{found['with_cvg']['rate']:.1%}, difference [{low:.1%}, {high:.1%}]"
        )


def _cell(entry: Mapping[str, Any], kind: str) -> str:
    found = entry[kind]
    if found["mean"] is None:
        return "–"
    low, high = found["ci95"]
    difference = entry.get("minus_first", {}).get(kind, {})
    interval = difference.get("ci95")
    mark = "*" if interval and (interval[0] > 0 or interval[1] < 0) else " "
    if kind in ("distance", "consistency"):
        return f"{found['mean']:.2f} [{low:.2f}, {high:.2f}]{mark}"
    return f"{found['mean']:6.1%} [{max(low, 0):.0%}, {min(high, 1):.0%}]{mark}"
