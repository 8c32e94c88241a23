"""CVG on edits: a direction that the prompt asks for, where next to nothing of the clip's own structure is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cvg_kernels.editing.structure import MOST_ROUNDS
from cvg_kernels.guidance import CVG
from cvg_kernels.intervals import paired_difference, rate
from cvg_kernels.shapes.edit_arms import edit
from cvg_kernels.shapes.edit_tasks import edit_tasks
from cvg_kernels.shapes.oracle import look
from cvg_kernels.shapes.world import DIRECTIONS

_BATCH = 10


def direction_guidance(pipe: Any, *, edits: int, seed: int) -> dict[str, Any]:
    """How often something moves as the prompt asks, in another direction than the clip's, without and with CVG.

    The classifier is that of the shapes pipeline, taken to the editor, whose denoiser began as that pipeline's.

    Args:
        pipe: the editor.
        edits: clips without and with CVG, from the same noise.
        seed: random seed of clips and noise.

    Returns:
        `edits`, the rates `without` and `with_cvg`, their paired `difference`, and `guided_steps` of all batches
        together.
    """
    tasks = edit_tasks(edits, seed)
    rng = np.random.default_rng((seed, 9))
    asked = [str(rng.choice([way for way in DIRECTIONS if way != task.scene.things[0].direction])) for task in tasks]
    prompts = [f"{task.prompt} moving {way}" for task, way in zip(tasks, asked, strict=True)]

    def right(frames: torch.Tensor, ways: Sequence[str]) -> list[bool]:
        return [
            any(one.direction == way for one in look(clip))
            for clip, way in zip(frames.float().cpu(), ways, strict=True)
        ]

    method = CVG(CVG().reader.taken_to(pipe))
    found: dict[str, list[bool]] = {"without": [], "with_cvg": []}
    steps = 0
    for start in range(0, edits, _BATCH):
        part = slice(start, start + _BATCH)
        seeds = [seed * 1_000_003 + start + number for number in range(len(tasks[part]))]
        options = {"prompt": prompts[part], "structure": MOST_ROUNDS}
        found["without"] += right(edit(pipe, tasks[part], seeds, **options), asked[part])
        with method.attach(pipe) as run:
            found["with_cvg"] += right(edit(pipe, tasks[part], seeds, **options), asked[part])
        steps += run.guided_steps
    report: dict[str, Any] = {name: rate(values) for name, values in found.items()}
    report["difference"] = paired_difference(found["without"], found["with_cvg"])
    return {"edits": edits, "guided_steps": steps, **report}
