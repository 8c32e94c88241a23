"""From a clip to the noise that it would have come from: DDIM inversion, or simply noising."""

from __future__ import annotations

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.models import denoisers_of, model_of
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


def _levels(pipe: VideoPipeline, steps: int) -> tuple[list[int], list[float]]:
    """Timesteps of a run, least noise first, and ᾱ of each."""
    pipe.scheduler.set_timesteps(steps)
    timesteps = [int(timestep) for timestep in pipe.scheduler.timesteps.flip(0)]
    return timesteps, [float(pipe.scheduler.alphas_cumprod[timestep]) for timestep in timesteps]


def _invert_step(
    latents: torch.Tensor, prediction: torch.Tensor, kind: str, before: float, after: float
) -> torch.Tensor:
    """The latents from which one DDIM step with this prediction leads to `latents`.

    A step with signal a = √ᾱ, noise s = √(1 − ᾱ) goes from (a, s) to (a', s'):  ε-prediction  z' = (a'/a) z +
    (s' − a's/a) ε;  v-prediction, where (a, s) = (cos θ, sin θ):  z' = cos(θ − θ') z − sin(θ − θ') v.

    Args:
        latents: z'.
        prediction: ε or v.
        kind: `"epsilon"` or `"v_prediction"`.
        before: ᾱ of z', with less noise.
        after: ᾱ of z, with more.
    """
    a, s = after**0.5, (1 - after) ** 0.5
    a_less, s_less = before**0.5, (1 - before) ** 0.5
    if kind == "v_prediction":
        cosine, sine = a * a_less + s * s_less, s * a_less - a * s_less
        return (latents + sine * prediction) / cosine
    return (latents - (s_less - a_less * s / a) * prediction) * (a / a_less)


@torch.no_grad()
def ddim_invert(
    pipe: VideoPipeline, latents: torch.Tensor, prompts: list[str], *, steps: int, refine: int = 1
) -> torch.Tensor:
    """DDIM inversion: the noise from which the sampler, without classifier-free guidance, makes a clip.

    A step of the sampler is z' = step(z, prediction(z)); inversion asks for z. The prediction at z is not known before
    z is, so that at z' is taken first (plain DDIM inversion) and then that at the z found, `refine` times.

    Args:
        pipe: a diffusers pipeline with a DDIM scheduler.
        latents: clean, `[B, C, F, h, w]`.
        prompts: that the denoiser is given, one a clip.
        steps: number of steps of the sampler.
        refine: fixed-point rounds.

    Raises:
        ArgumentError: for a denoiser or prediction type that this does not know.
    """
    (denoiser,) = denoisers_of(pipe)
    model = model_of(denoiser)
    kind = getattr(pipe.scheduler.config, "prediction_type", None)
    if not hasattr(pipe, "unet") or kind not in ("epsilon", "v_prediction"):
        raise ArgumentError(
            "pipe must have a UNet that predicts 'epsilon' or 'v_prediction' to be inverted, got "
            f"{type(denoiser).__name__} with {kind!r}"
        )
    text = pipe.encode_prompt(prompts, latents.device, 1, False)[0]
    if model.text_per_frame:
        text = text.repeat_interleave(latents.shape[2], dim=0)
    less = 1.0  # ᾱ of clean latents
    for timestep, level in zip(*_levels(pipe, steps), strict=True):
        source = latents
        for _ in range(1 + refine):
            prediction = denoiser(latents.to(denoiser.dtype), timestep, text, return_dict=False)[0].float()
            latents = _invert_step(source, prediction, kind, less, level)
        less = level
    return latents


def add_noise(pipe: VideoPipeline, latents: torch.Tensor, *, steps: int, generator: torch.Generator) -> torch.Tensor:
    """The other way to the first step: z = √ᾱ z₀ + √(1 − ᾱ) ε at its noise level.

    Args:
        pipe: a diffusers pipeline.
        latents: clean, `[B, C, F, h, w]`.
        steps: number of steps of the sampler.
        generator: source of ε.
    """
    level = _levels(pipe, steps)[1][-1]
    noise = torch.randn(latents.shape, generator=generator)
    return level**0.5 * latents + (1 - level) ** 0.5 * noise
