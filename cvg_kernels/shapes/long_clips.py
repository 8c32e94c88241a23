"""Clips longer than the shapes model was trained on, in which the colour or the direction changes half-way.

The measure of VSTAR's ingredients: does the asked state appear in the asked part of the clip, do neighbouring frames
agree, and how much does temporal attention lie along the diagonal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cvg_kernels.capturing import capture
from cvg_kernels.guidance import VSTAR, diagonality
from cvg_kernels.intervals import mean, paired_differences, rate
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.processes import Place, gather
from cvg_kernels.shapes.oracle import frame_consistency, look
from cvg_kernels.shapes.pipeline import sample
from cvg_kernels.shapes.world import COLOURS, DIRECTIONS, FRAMES, Thing, random_things

States = tuple[Thing, Thing]
_SHOWN = ("first_state", "second_state", "both_states")
_MEANS = ("consistency", "diagonality")
_ALONE = Place()


def changing_things(count: int, seed: int) -> list[States]:
    """Pairs of states of one object: every second changes its colour, the others turn round.

    Args:
        count: how many.
        seed: random seed of the draw.
    """
    rng = np.random.default_rng((seed, 5))
    pairs = []
    for number in range(count):
        (thing,) = random_things(rng, 1, held_out=None)
        if number % 2 == 0:
            colour = rng.choice([name for name in COLOURS if name != thing.colour])
            pairs.append((thing, replace(thing, colour=str(colour))))
        else:
            x, y = DIRECTIONS[thing.direction]
            back = next(name for name, step in DIRECTIONS.items() if step == (-x, -y))
            pairs.append((thing, replace(thing, direction=back)))
    return pairs


def states_shown(frames: torch.Tensor, states: States) -> tuple[bool, bool]:
    """Whether each half of a clip shows its state: its colour, or where that stays its direction.

    Args:
        frames: `[F, 3, 64, 64]` in [0, 1].
        states: states of the first and of the second half.
    """
    halves = frames.split(-(-len(frames) // 2))
    turns = states[0].colour == states[1].colour
    first, second = (
        any(one.colour == state.colour and (not turns or one.direction == state.direction) for one in look(half))
        for half, state in zip(halves, states, strict=True)
    )
    return first, second


def arms(sigma: Any = 16.0, strength: float = 1.0) -> dict[str, Callable[[States], VSTAR]]:
    """Each ingredient alone, both, neither, and a synopsis whose states are held; frame positions squeezed in all.

    Args:
        sigma: sigma of the band, see `VSTAR`.
        strength: strength of the band.
    """

    def texts(states: States) -> list[str]:
        return [str(state) for state in states]

    band = {"sigma": sigma, "strength": strength}
    return {
        "untouched": lambda states: VSTAR(sigma=None, trained_frames=FRAMES),
        "band": lambda states: VSTAR(**band, trained_frames=FRAMES),
        "synopsis": lambda states: VSTAR(sigma=None, prompts=texts(states), trained_frames=FRAMES),
        # the first and the last third hold still, the text changes in the middle
        "held": lambda states: VSTAR(sigma=None, prompts=texts(states), hold=2, trained_frames=FRAMES),
        "both": lambda states: VSTAR(**band, prompts=texts(states), trained_frames=FRAMES),
    }


def evaluate_long(
    pipe: VideoPipeline,
    *,
    frames: int = 24,
    prompts: int = 60,
    seed: int = 0,
    methods: dict[str, Callable[[States], VSTAR]] | None = None,
    progress: Callable[[str, int], None] = lambda name, done: None,
    place: Place = _ALONE,
    **options: Any,
) -> dict[str, Any]:
    """Scores VSTAR's ingredients on the same prompts and seeds; several processes share the clips.

    Args:
        pipe: the shapes pipeline.
        frames: length of the clips.
        prompts: how many.
        seed: random seed of prompts and noise.
        methods: name → method for given states; `None` takes `arms()`.
        progress: called with method and number of clips made.
        place: place of this process.
        **options: options of `pipeline.sample`.

    Returns:
        frames, prompts, seed, and per method, with 95 % intervals: how often the clip shows its first state in its
        first half, its second in its second, and both; the means of the frames' `consistency` and of the `diagonality`
        of the conditional branch's temporal maps; `seconds_per_clip`; and (from the second method on) the paired
        differences to the first.
    """
    pairs = changing_things(prompts, seed)
    report: dict[str, Any] = {"frames": frames, "prompts": prompts, "seed": seed, "guidance": {}}
    first: dict[str, list[float]] | None = None
    for name, method in (methods or arms()).items():
        mine: dict[int, tuple[float, ...]] = {}
        began = time.perf_counter()
        for number in range(place.rank, prompts, place.count):
            states = pairs[number]
            noise = seed * 1_000_003 + number
            with method(states).attach(pipe), capture(pipe, temporal=True) as captured:
                (clip,) = sample(pipe, [str(states[0])], [noise], frames=frames, **options)
            shown = states_shown(clip, states)
            diagonal = _mean_diagonality(captured.records)
            mine[number] = (*shown, all(shown), frame_consistency(clip), diagonal)
            progress(name, min(len(mine) * place.count, prompts))
        shares = gather((time.perf_counter() - began, mine), place)
        found = {number: values for _, part in shares for number, values in part.items()}
        rows = zip(*(found[number] for number in range(prompts)), strict=True)
        scores = dict(zip((*_SHOWN, *_MEANS), map(list, rows), strict=True))
        progress(name, prompts)
        seconds = sum(taken for taken, _ in shares) / prompts
        entry: dict[str, Any] = {kind: rate(scores[kind]) for kind in _SHOWN}
        entry |= {kind: mean(scores[kind]) for kind in _MEANS}
        entry["seconds_per_clip"] = seconds
        if first is None:
            first = scores
        else:
            entry["against_first"] = paired_differences(first, scores)
        report["guidance"][name] = entry
    return report


def _mean_diagonality(records: Sequence[Any]) -> float:
    each = [diagonality(record.maps).mean() for record in records if record.branch == "cond"]
    return float(torch.stack(each).mean())


def print_long(report: dict[str, Any]) -> None:
    """Prints the rates and means as a table."""
    print(f"{report['prompts']} clips of {report['frames']} frames, seed {report['seed']}; 95 % intervals")
    names = (kind.ljust(20) for kind in (*_SHOWN, *_MEANS))
    print("  ".join(["method".ljust(10), *names, "s/clip"]))
    for name, entry in report["guidance"].items():
        cells = []
        for kind in (*_SHOWN, *_MEANS):
            low, high = entry[kind]["ci95"]
            middle = entry[kind]["rate" if kind in _SHOWN else "mean"]
            cells.append(f"{middle:.3f} [{low:.2f}, {high:.2f}]".ljust(20))
        print("  ".join([name.ljust(10), *cells, f"{entry['seconds_per_clip']:.2f}"]))
