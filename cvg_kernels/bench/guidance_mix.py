"""Guidance mixes against the expression written out, as every pipeline has it, and against its compiled form.

Three forms: classifier-free guidance u + ω (c − u); Gen-1's i + ω_t (u − i) + ω (c − u); and classifier-free guidance
with diffusers' rescale. Compiled arms are compiled before the clock starts. On a GPU every arm is there a second time
as a CUDA graph: what the GPU takes, without the Python of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cvg_kernels.bench.harness import OURS, graphed_where_possible, median_seconds
from cvg_kernels.ops import guidance_mix

KIND, ROUNDS = "latents", {"cpu": 200, "gpu": 200}
TEMPORAL_SCALE, SCALE, RESCALE = 1.5, 7.5, 0.7


class Shape(NamedTuple):
    """Latents of a model."""

    name: str
    size: tuple[int, ...]


SHAPES = (
    Shape("Wan 480p 81 frames, batch 2", (2, 16, 21, 60, 104)),
    Shape("VideoCrafter2 320×512", (1, 4, 16, 40, 64)),
)
QUICK_SHAPES = (Shape("quick", (1, 4, 4, 8, 8)),)


def classifier_free(image, uncond, cond):
    """As pipelines write it."""
    return uncond + SCALE * (cond - uncond)


def temporal(image, uncond, cond):
    """Gen-1's formula."""
    return image + TEMPORAL_SCALE * (uncond - image) + SCALE * (cond - uncond)


def rescaled(image, uncond, cond):
    """As diffusers' rescale_noise_cfg."""
    mix = uncond + SCALE * (cond - uncond)
    dims = list(range(1, mix.ndim))
    same_spread = mix * (cond.std(dims, keepdim=True) / mix.std(dims, keepdim=True))
    return RESCALE * same_spread + (1 - RESCALE) * mix


FORMS: dict[str, tuple[Callable, Callable]] = {
    "classifier-free": (classifier_free, lambda i, u, c: guidance_mix([u, c], [SCALE])),
    "Gen-1": (temporal, lambda i, u, c: guidance_mix([i, u, c], [TEMPORAL_SCALE, SCALE])),
    "with rescale": (rescaled, lambda i, u, c: guidance_mix([u, c], [SCALE], rescale=RESCALE)),
}


def cases(device: torch.device, quick: bool) -> tuple[Shape, ...]:
    """The latents."""
    return QUICK_SHAPES if quick else SHAPES


def measure(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times of every arm of every form on one model's latents.

    Raises:
        AssertionError: if ours does not compute what the expression says in float64: a wrong result is not timed.
    """
    predictions = [torch.randn(shape.size, device=device).to(dtype) for _ in range(3)]
    forms = {}
    for form, (written_out, ours) in FORMS.items():
        exact = written_out(*(p.double() for p in predictions))
        error = (ours(*predictions).double() - exact).abs().max() / exact.abs().max()
        assert error < torch.finfo(dtype).eps * 2, f"{form} is off by {error.item():.2g}"
        arms = {"eager": written_out, "torch.compile": torch.compile(written_out), OURS: ours}
        calls = {name: _call(arm, predictions) for name, arm in arms.items()}
        forms[form] = median_seconds(calls, device, rounds)
        if device.type == "cuda":
            times = median_seconds(graphed_where_possible(calls), device, rounds)
            forms[form] |= {f"{name}, graph": took for name, took in times.items()}
    return {"shape": shape._asdict(), "dtype": str(dtype).removeprefix("torch."), "seconds": forms}


def _call(arm: Callable, predictions: list[torch.Tensor]) -> Callable[[], Any]:
    def call():
        with torch.no_grad():
            return arm(*predictions)

    return call


def show(latents: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints one model's forms."""
    shape = Shape(**latents["shape"])
    print(f"{shape.name}  {list(shape.size)} {latents['dtype']}")
    for form, seconds in latents["seconds"].items():
        cells = (
            f"{name} {took if isinstance(took, str) else f'{took * 1e6:.0f} µs'}" for name, took in seconds.items()
        )
        print(f"  {form:16}  {',  '.join(cells)}")
