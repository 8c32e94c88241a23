"""Whether a model of this world fails as large models fail, before any guidance is judged on it.

Three questions. How do things that are named fail: are most of them dropped? Do the maps of nouns lie on their objects
in real clips? And do maps at the first steps tell, of clips of one prompt, which will show a thing: is there something
for guidance to see?
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import cvg_kernels as cvg
from cvg_kernels.guidance.losses import concentration, overlaps
from cvg_kernels.intervals import rate
from cvg_kernels.scenes.captions import Caption, random_things
from cvg_kernels.scenes.oracle import look
from cvg_kernels.scenes.pipeline import sample
from cvg_kernels.scenes.ranking import within_prompt_auc
from cvg_kernels.scenes.verdict import FAILURES, Verdict, judge
from cvg_kernels.scenes.world import FRAMES

#: Steps of denoising whose maps are looked at.
STEPS = (0, 2, 4, 8)


def prompts_of_things(count: int, seed: int) -> list[Caption]:
    """Prompts that name two to four things of different colours and shapes and say nothing else of them.

    Args:
        count: how many.
        seed: random seed of the draw.
    """
    rng = np.random.default_rng((seed, 5))
    found = []
    while len(found) < count:
        things = random_things(rng, 2 + len(found) % 3)
        if len({thing.shape for thing in things}) == len(things):
            found.append(Caption(things))
    return found


def failures(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How often things that are named are right, and how often each kind of failure is seen, with 95 % intervals."""
    each = Counter(one for verdict in verdicts for one in verdict.things)
    total = sum(each.values())
    report: dict[str, Any] = {
        kind: rate([True] * each[kind] + [False] * (total - each[kind])) for kind in ("right", *FAILURES)
    }
    relations = [verdict.relation for verdict in verdicts if verdict.relation is not None]
    report["wrong relation"] = rate([not holds for holds in relations])
    report["extra"] = rate([verdict.extra > 0 for verdict in verdicts])
    report["all right"] = rate([verdict.all_right for verdict in verdicts])
    return report


def statistics(maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the maps of a clip's words say of each word, `[B, K]` each; large should mean that its object will be
    there.

    Args:
        maps: `[B, K, F, h, w]`.
    """
    flat = maps.flatten(3)  # [B, K, F, places]
    own = torch.eye(maps.shape[1], dtype=torch.bool)
    strongest_other = torch.stack(
        [torch.cat([flat[:, :k], flat[:, k + 1 :]], 1).amax(1) for k in range(maps.shape[1])], 1
    )
    softmax = (100 * flat).softmax(1)
    return {
        "largest": flat.amax((2, 3)),
        "largest of a frame, mean": flat.amax(3).mean(2),
        "largest of a frame, least": flat.amax(3).amin(2),
        "mean": flat.mean((2, 3)),
        "share of the words' softmax, largest": softmax.amax((2, 3)),
        "concentration": concentration(maps),
        "minus largest overlap": -overlaps(maps).masked_fill(own, -1).amax(2),
        "largest margin over others": (flat - strongest_other).amax((2, 3)),
    }


def presence(
    pipe: Any,
    prompts: Sequence[Caption],
    *,
    seeds: int,
    seed: int,
    frames: int = FRAMES,
    progress: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> tuple[list[Verdict], dict[str, Any]]:
    """Makes clips of each prompt from several seeds, judges them, and asks what maps told of them.

    Args:
        pipe: the pipeline.
        prompts: prompts of things with different shapes, whose nouns are looked at.
        seeds: clips a prompt.
        seed: random seed of the noise.
        frames: length of the clips.
        progress: called with the number of clips made.
        **options: options of `shapes.pipeline.sample`.

    Returns:
        The verdicts, prompt by prompt; and by level of the maps, step and statistic, the share of pairs of clips of
        one prompt, one that shows a thing and one that does not, in which the statistic is larger where it is shown
        (`within_prompt_auc`).
    """
    verdicts: list[Verdict] = []
    values: dict[tuple[str, int, str], list[np.ndarray]] = {}
    shown: list[np.ndarray] = []
    for number, prompt in enumerate(prompts):
        nouns = [thing.shape for thing in prompt.things]
        numbers = [seed * 1_000_003 + number * seeds + index for index in range(seeds)]
        with cvg.capture(pipe, words=nouns) as captured:
            clips = sample(pipe, [str(prompt)] * seeds, numbers, frames=frames, **options)
        here = [judge(look(clip), prompt) for clip in clips]
        verdicts += here
        shown.append(np.array([verdict.shown for verdict in here]))
        for level, step, maps in _levels(captured.records):
            for name, each in statistics(maps).items():
                values.setdefault((level, step, name), []).append(each.numpy())
        progress(len(verdicts))
    table: dict[str, Any] = {}
    for (level, step, name), each in values.items():
        found = within_prompt_auc(each, shown)
        table.setdefault(level, {}).setdefault(str(step), {})[name] = found
    return verdicts, table


def _levels(records: Sequence[Any]) -> list[tuple[str, int, torch.Tensor]]:
    """Maps of the prompt's branch, mean over the layers of a grid, at the steps looked at."""
    groups: dict[tuple[str, int], list[torch.Tensor]] = {}
    for record in records:
        if record.branch == "cond" and record.step in STEPS:
            level = f"{record.grid[1]}×{record.grid[2]}"
            groups.setdefault((level, record.step), []).append(record.maps.float().cpu())
    return [(*key, torch.stack(maps).mean(0)) for key, maps in groups.items()]


def print_failures(report: dict[str, Any]) -> None:
    """Prints the kinds of failure, the most frequent first."""
    order = ["right", *sorted(FAILURES, key=lambda kind: -report[kind]["rate"])]
    for kind in (*order, "wrong relation", "extra", "all right"):
        low, high = report[kind]["ci95"]
        print(f"{kind:16} {report[kind]['rate']:6.1%} [{low:.1%}, {high:.1%}] of {report[kind]['n']}")


def print_presence(table: dict[str, Any]) -> None:
    """Prints, for every level of the maps, the AUC of each statistic at each step."""
    for level, by_step in table.items():
        print(f"maps of {level}: AUC within a prompt, by step [95 % interval]")
        names = list(next(iter(by_step.values())))
        print("  ".join(["".ljust(38), *(f"step {step}".ljust(18) for step in by_step)]))
        for name in names:
            cells = []
            for each in by_step.values():
                found = each[name]
                low, high = found["ci95"] or (float("nan"),) * 2
                auc = "–" if found["auc"] is None else f"{found['auc']:.2f} [{low:.2f}, {high:.2f}]"
                cells.append(auc.ljust(18))
            print("  ".join([name.ljust(38), *cells]))
