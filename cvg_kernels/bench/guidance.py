"""What a guided denoising step costs: the first step of the shapes pipeline, under every method and form.

The arms are the pipeline up to the end of its first step, text encoding included, so what a method costs is the
difference to the arm without one. Needs diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch

from cvg_kernels.bench.harness import median_seconds
from cvg_kernels.guidance.methods import method_named
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.shapes.pipeline import GUIDANCE_SCALE, STEPS, load_pipeline
from cvg_kernels.shapes.world import FRAMES, SIZE

KIND, ROUNDS = "pipelines", {"cpu": 7, "gpu": 20}
PROMPT = "a red circle moving left and a blue square moving right"
METHODS = (
    "none",
    "vico",
    "vico:flow=hard",
    "vico:flow=cross",
    "vico:flow=exact",
    "vico:spatial=True",
    "vico:flow=exact:spatial=True",
    "cvg",
    "temporal-band",
    "vstar",
    "gen1:temporal_scale=2.0",
)


class _StepDone(Exception):
    """Ends a pipeline's call after its first step."""


def first_step(pipe: VideoPipeline, method: Any) -> Callable[[], None]:
    """The call of a pipeline up to the end of its first denoising step."""

    def stop(*_: Any) -> dict[str, Any]:
        raise _StepDone

    def call() -> None:
        attached = nullcontext() if method is None else method.attach(pipe)
        with attached, suppress(_StepDone):
            pipe(
                PROMPT,
                num_frames=FRAMES,
                height=SIZE,
                width=SIZE,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=torch.Generator().manual_seed(0),
                callback_on_step_end=stop,
            )

    return call


def cases(device: torch.device, quick: bool) -> list[tuple[str, ...]]:
    """The methods, all on the one pipeline that ships."""
    return [METHODS[:2] if quick else METHODS]


def measure(methods: tuple[str, ...], device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of the first step under every method. The pipeline is float32, whatever `dtype`."""
    pipe = load_pipeline(device=device)
    arms = {name: first_step(pipe, method_named(name)) for name in methods}
    return {"pipeline": "shapes", "seconds": median_seconds(arms, device, rounds)}


def show(figures: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints one line a method."""
    seconds = figures["seconds"]
    print(f"{'first denoising step':30}  {'all':>9}  {'guidance':>9}")
    for name, took in seconds.items():
        cost = (took - seconds["none"]) * 1e3
        print(f"{name:30}  {took * 1e3:6.1f} ms  {cost:6.1f} ms")
