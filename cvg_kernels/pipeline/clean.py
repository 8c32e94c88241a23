"""What a denoiser's answer stands for: the video as predicted, and the clean latents of it."""

from __future__ import annotations

from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.models import unwrap


def prediction_of(call: Call, output: Any) -> torch.Tensor:
    """The prediction in a denoiser's answer, `[B, C, F, H, W]` in float32 or float64, without variances told beside
    it.

    Args:
        call: that was answered.
        output: as the denoiser returned it.

    Raises:
        ArgumentError: if the answer is no video of the size of the latents.
    """
    first = output[0] if isinstance(output, (tuple, list)) or hasattr(output, "keys") else output
    video = None
    if torch.is_tensor(first):
        model, config = call.model, getattr(unwrap(call.denoiser), "config", None)
        video = model.named({**call.arguments, model.latents: first}, config)
    if video is None or video.shape != call.latents.shape:
        raise ArgumentError(
            f"the answer of {type(unwrap(call.denoiser)).__name__} must be a video of {tuple(call.latents.shape)}, "
            f"got {tuple(video.shape) if torch.is_tensor(video) else type(first).__name__}"
        )
    return video.to(torch.promote_types(video.dtype, torch.float32))


def check_clean(scheduler: Any) -> None:
    """Checks that clean latents can be told from a prediction and the noisy ones.

    Raises:
        ArgumentError: for a scheduler of another kind than those of `clean_latents`.
    """
    if _flows(scheduler) is None:
        raise ArgumentError(
            f"scheduler {type(scheduler).__name__} must predict the noise, the sample, v or a flow for clean latents "
            "to be told: give of='prediction'"
        )


def clean_latents(call: Call, latents: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """The clean latents x̂ that a prediction stands for, differentiable in both.

        flow: x̂ = z − σ p;   noise: (z − σ p) / α;   v: α z − σ p;   sample: p       (α² + σ² = 1 but for flows)

    Args:
        call: the step's.
        latents: z `[B, C, F, H, W]`, of the kind of `call.latents`.
        prediction: p, likewise.
    """
    scheduler = call.pipe.scheduler
    steps = scheduler.config.num_train_timesteps
    if _flows(scheduler):
        return latents - call.timestep / steps * prediction
    # A scheduler that keeps x + noise has the denoiser given α times that, which is of variance 1 as others keep it.
    z, alpha = latents * call.scale, call.scale
    if alpha == 1:
        alphas = scheduler.alphas_cumprod
        alpha = float(alphas[min(max(round(call.timestep), 0), len(alphas) - 1)]) ** 0.5
    sigma = (1 - alpha**2) ** 0.5
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return alpha * z - sigma * prediction
    return (z - sigma * prediction) / alpha


def _flows(scheduler: Any) -> bool | None:
    """Whether predictions are flows from data to noise, with t = σ · steps; `None` if they are of no known kind."""
    config = scheduler.config
    kind = config.get("prediction_type")
    if kind == "flow_prediction" or hasattr(scheduler, "scale_noise"):  # of all flow matchers
        return True
    known = kind in ("epsilon", "v_prediction", "sample")
    return False if known and hasattr(scheduler, "alphas_cumprod") else None
