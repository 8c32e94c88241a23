"""FlowMo: motion is coherent where what the model predicts changes evenly from frame to frame.

"FlowMo: Variance-Based Flow Guidance for Coherent Motion in Video Generation" (arXiv 2506.01144). The differences
between neighbouring frames of a prediction leave appearance out; at a place where they vary much over time, motion
jumps. The latents of the first steps are moved so that the largest such variance falls. No maps are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.base import Guidance, check_choice, check_count, check_number
from cvg_kernels.guidance.descent import descend
from cvg_kernels.guidance.losses import motion_variance
from cvg_kernels.guidance.steps import STEP_RULES, LatentStepper, StepRule
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.clean import check_clean, clean_latents, prediction_of
from cvg_kernels.pipeline.guards import check_extra_forwards
from cvg_kernels.pipeline.layers import check_undivided
from cvg_kernels.pipeline.models import denoisers_of
from cvg_kernels.pipeline.session import Run
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


@dataclass(frozen=True)
class FlowMo(Guidance):
    """FlowMo's guidance; attach it to a pipeline as a context manager.

        with cvg.FlowMo().attach(pipe) as run:
            frames = pipe("a boy flying a kite", num_frames=33).frames[0]
        run.history   # loss at every evaluation

    With x̂ `[C, F, H, W]` what the model predicts at a step, the latents go down the gradient of

        max over places (or mean) of  mean_c Var_f |x̂_{c, f+1} − x̂_{c, f}|

    Every pipeline whose denoiser gives a video as a whole can be guided, whatever its attention.

    Attributes:
        of: x̂ is `"clean"`, the clean latents that the network's answer stands for (the released code), or
            `"prediction"`, the answer itself (the paper's text; for networks that predict noise this is mostly noise).
        over: `"max"` over places (both) or `"mean"`.
        step_rule: `"normalized"`, `"adam"` (both) or `"sgd"`.
        step_size: see `LatentStepper`.
        iterations: updates per guided step.
        stop: share of the denoising steps that are guided (released: 12 of 50).

    The released code looks at the prediction after classifier-free guidance, at the cost of a second evaluation; here
    it is that of the conditional branch. It keeps the best of its iterates; here it is the last, as in all methods.
    """

    of: Literal["clean", "prediction"] = "clean"
    over: Literal["max", "mean"] = "max"
    step_rule: StepRule = "normalized"
    step_size: float = 0.03
    iterations: int = 1
    stop: float = field(default=0.24, kw_only=True)

    @classmethod
    def released(cls, **changes: Any) -> FlowMo:
        """The settings of the released code."""
        return replace(cls(step_rule="adam", step_size=0.005), **changes)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("of", self.of, ("clean", "prediction"))
        check_choice("over", self.over, ("max", "mean"))
        check_choice("step_rule", self.step_rule, STEP_RULES)
        check_number("step_size", self.step_size, 0)
        check_count("iterations", self.iterations)

    @property
    def idle(self) -> bool:
        """Whether no update is asked for."""
        return super().idle or self.iterations == 0

    def check(self, pipe: VideoPipeline) -> None:
        """Checks that the denoiser sees a video as a whole, and that clean latents can be told from its answer.

        Raises:
            ArgumentError: if not.
        """
        for denoiser in denoisers_of(pipe):
            check_extra_forwards(denoiser)
            check_undivided(denoiser)
        if self.of == "clean":
            check_clean(pipe.scheduler)

    def before_step(self, call: Call, run: Run) -> torch.Tensor | None:
        """Moves the latents of one denoising step; see `Guidance`."""
        if self.iterations == 0:
            return None
        if call.latents.shape[2] < 3:
            raise ArgumentError(
                f"FlowMo compares the changes between frames, of which there must be three at least: the latents have "
                f"{call.latents.shape[2]}"
            )

        def loss_at(z: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            prediction = prediction_of(call, call.denoise(z))
            if self.of == "clean":
                prediction = clean_latents(call, z, prediction)
            return motion_variance(prediction, self.over), {}

        stepper = LatentStepper(self.step_rule, self.step_size)
        return descend(call, run, loss_at, stepper, iterations=self.iterations)
