"""Methods and pipelines of the matrix: what each method shall do on each pipeline, and where it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import cvg_kernels as cvg
from cvg_kernels.guidance.base import Guidance
from cvg_kernels.pipeline.models import MODELS
from tests.composition.tiny import tiny_classifier
from tests.pipeline.snapshot import Snapshot
from tests.pipelines import PIPELINES, PROMPT, STEPS, PipelineCase, in_float64, run
from tests.pipelines.case import is_modular

#: Those whose latents are stated; tests/coverage has all.
KNOWN = [n for n, case in PIPELINES.items() if case.denoiser in MODELS and case.latents]
UNKNOWN = [name for name, case in PIPELINES.items() if case.denoiser not in MODELS]

#: Of two words, in the order of the prompt; "blue dog" has two tokens.
WORDS = ["cat", "blue dog"]
STATES = ["a red cat", "a blue dog"]
#: Rounding moves the latents of these networks by at most 1e-5; what a method does is well above it.
ROUNDING = 1e-4


@dataclass
class Built:
    """A pipeline, how it is called, and what it gives without us."""

    case: PipelineCase
    pipe: Any
    options: dict[str, Any]
    stock: torch.Tensor
    before: Snapshot

    @classmethod
    def of(cls, name: str, *, double: bool = False, **arguments: Any) -> Built:
        """Builds one; `double` has weights and noise in float64, see `in_float64`."""
        case = PIPELINES[name]
        built = case.build(**arguments)
        pipe, options = in_float64(built) if double else built
        if not is_modular(pipe):  # those have no way to end in latents
            options["output_type"] = "latent"
        stock = run(pipe, options)
        return cls(case, pipe, options, stock, Snapshot(pipe))

    def run(self, *args: Any, **changes: Any) -> torch.Tensor:
        """A run from the same noise."""
        return run(self.pipe, self.options, *args, **changes)

    def is_as_before(self) -> None:
        """Asserts that nothing is left on the pipeline."""
        self.before.check(self.pipe)

    def runs_as_before(self) -> None:
        """Asserts that nothing is left on the pipeline, and that it gives the same to the bit."""
        self.is_as_before()
        assert torch.equal(self.run(), self.stock)
        self.is_as_before()

    @property
    def steps(self) -> int:
        """Steps of one round, as each call of the denoiser tells them."""
        asked = self.options.get("num_inference_steps", STEPS)
        return self.case.denoising_steps(asked) // self.case.rounds

    def guided(self, start: float, stop: float) -> list[tuple[int, int]]:
        """The steps between two shares of a run, as `Run.guided` lists them."""
        first, last = (math.ceil(share * self.steps - 1e-9) for share in (start, stop))
        return [(0, step) for _ in range(self.case.rounds) for step in range(first, last)]

    @cached_property
    def classifier(self) -> cvg.CompositionClassifier:
        """Of random weights; reads every step of this pipeline."""
        return tiny_classifier(self.pipe, range(0, 1001, 250), grid=(2, 3, 3))


# -- where a method is refused, by the beginning of what the error says


def _split(case: PipelineCase) -> str | None:
    return "FreeNoise's split inference" if case.name == "animatediff_freenoise_split" else None


def _no_one_text(case: PipelineCase) -> str | None:
    by_frame = case.name == "animatediff_freenoise_prompts"
    return "prompt must be one text where words are looked for" if by_frame else None


def _windows(case: PipelineCase) -> str | None:
    several = case.name.startswith("animatediff_freenoise") and case.latents[0] > 8
    return "sees 8 of 12 frames at a time" if several else None


def _joint_frames(case: PipelineCase) -> str | None:
    return None if case.temporal else f"prompts must be None for .*{_plain(case)}"


def _no_image_model(case: PipelineCase) -> str | None:
    has = case.denoiser in ("UNetMotionModel", "UNet3DConditionModel")
    return None if has else f"denoiser must have temporal layers of its own .*{_plain(case)}"


def _plain(case: PipelineCase) -> str:
    return "_HouseTransformer" if case.name == "wan_subclass" else case.denoiser


def _first(*reasons: Callable[[PipelineCase], str | None]) -> Callable[[PipelineCase], str | None]:
    return lambda case: next((why for reason in reasons if (why := reason(case))), None)


# -- the methods


@dataclass(frozen=True)
class Method:
    """A guidance method and what is expected of it.

    Attributes:
        make: (pipeline, strength: 1 or 0, other settings) → the method.
        stop: share of the steps that it guides.
        refused: case → a regular expression of the error, or `None`.
        counts: whether its steps count as guided at strength 0 too.
        exact: whether at strength 0 the video is the stock one to the bit.
    """

    make: Callable[..., Guidance]
    stop: float
    refused: Callable[[PipelineCase], str | None]
    counts: bool
    exact: bool = True

    def __call__(self, built: Built, strength: float = 1, **settings: Any) -> Guidance:
        return self.make(built, strength, **settings)


def _cvg(built: Built, strength: float, **settings: Any) -> Guidance:
    return cvg.CVG(
        built.classifier,
        label=["left", "right"],
        step_size=0.1 * strength,
        **{"stop": 0.5, "iterations": 1, **settings},
    )


def _vico(built: Built, strength: float, **settings: Any) -> Guidance:
    return cvg.Vico(WORDS, step_size=0.1 * strength, **{"stop": 0.5, "iterations": 1, **settings})


def _temporal_band(built: Built, strength: float, **settings: Any) -> Guidance:
    return cvg.TemporalBand(step_size=0.1 * strength, **{"stop": 0.5, **settings})


def _vstar(built: Built, strength: float, **settings: Any) -> Guidance:
    return cvg.VSTAR(sigma=0.5, strength=4.0 * strength, **settings)


def _synopsis(built: Built, strength: float, **settings: Any) -> Guidance:
    return cvg.VSTAR(sigma=None, prompts=STATES if strength else [PROMPT], **settings)


def _gen1(built: Built, strength: float, **settings: Any) -> Guidance:
    return cvg.Gen1(1 + strength, **settings)


METHODS: dict[str, Method] = {
    "cvg": Method(_cvg, 0.5, _first(_split, _no_one_text), counts=True),
    "vico": Method(_vico, 0.5, _first(_split, _no_one_text, _windows), counts=True),
    "vico_cross": Method(
        lambda *given, **settings: _vico(*given, flow="cross", **settings),
        0.5,
        _first(_split, _no_one_text),
        counts=True,
    ),
    "temporal_band": Method(_temporal_band, 0.5, _first(_split, _windows), counts=True),
    "vstar": Method(_vstar, 0.56, _split, counts=False),
    # The text is encoded once more for the states, in a batch of another size: rounded otherwise.
    "synopsis": Method(_synopsis, 1.0, _first(_split, _joint_frames), counts=True, exact=False),
    "gen1": Method(_gen1, 1.0, _no_image_model, counts=False),
}
