"""What a move of the latents has to become: the rule.

It is stated on its own, from the schedulers' public schedules: latents are αx₀ + σε; with the model's output
held fixed a move δ is a move Δ of x₀ and e of the noise, δ = αΔ + σe; a step makes α'Δ + rσ'e of it, where r is what a
stochastic step leaves of the noise that was there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

STEPS = 8
Levels = list[tuple[float, float]]


@dataclass(frozen=True)
class Case:
    """One configuration of a scheduler.

    Attributes:
        scheduler: the class's name.
        config: its configuration.
        levels: gives (α, σ) before each step and after the last one.
        prediction: how far x₀ moves when the sample moves by 1, at (α, σ).
        kept: r, from (α, σ) before and after a step and the step's timestep.
        lasting: whether the rule is exact for the steps after the moved one too, not for the moved one only.
    """

    scheduler: str
    config: dict[str, Any]
    levels: Callable[[Any], Levels]
    prediction: Callable[[float, float], float]
    kept: Callable[..., float] = lambda before, after, timestep: 1.0
    lasting: bool = True

    def build(self, steps: int = STEPS, **arguments: Any):
        needs = {
            "scipy": ("LMSDiscreteScheduler",),
            "torchsde": ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"),
        }
        for module, names in needs.items():
            if self.scheduler in names:
                pytest.importorskip(module)
        scheduler = getattr(diffusers, self.scheduler)(**self.config)
        if self.scheduler == "SCMScheduler":
            arguments["intermediate_timesteps"] = None
        scheduler.set_timesteps(steps, **arguments)
        return scheduler

    def entries(self, scheduler: Any) -> int:
        """How many entries of the schedule are stepped from: SCM's last one is the end."""
        return len(scheduler.timesteps) - (self.scheduler == "SCMScheduler")

    def expected(self, scheduler: Any, first: int) -> list[float]:
        """What a move of 1 before step `first` is after it and after each later step."""
        levels, size, sizes = self.levels(scheduler), 1.0, []
        for step in range(first, len(levels) - 1):
            before, after = levels[step], levels[step + 1]
            x0 = self.prediction(*before)
            noise = (1 - before[0] * x0) / before[1]
            # At σ' = 0 nothing of the noise is left, whatever r is there.
            rest = self.kept(before, after, self.timestep(scheduler, step)) * after[1] if after[1] else 0.0
            size *= after[0] * x0 + rest * noise
            sizes.append(size)
        return sizes

    @staticmethod
    def timestep(scheduler: Any, step: int) -> float:
        return float(scheduler.timesteps[step]) if step < len(scheduler.timesteps) else 0.0

    def __str__(self) -> str:
        config = ",".join(f"{key}={value}" for key, value in self.config.items() if key not in BETAS)
        return f"{self.scheduler}({config})"


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def from_sigmas(unscaled: bool = False, flow: bool = False, calls: bool = False) -> Callable[[Any], Levels]:
    """(α, σ) from `scheduler.sigmas`: unscaled latents x₀ + σε, variance-preserving ones, or flows (1−σ)x₀ + σε."""

    def levels(scheduler: Any) -> Levels:
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        if calls:  # schedulers with several calls a step repeat the inner ones
            sigmas = [sigma for at, sigma in enumerate(sigmas) if at == 0 or sigma != sigmas[at - 1]]
        if flow:
            return [(1 - sigma, sigma) for sigma in sigmas]
        if unscaled:
            return [(1.0, sigma) for sigma in sigmas]
        return [(1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)) for sigma in sigmas]

    return levels


def from_alphas(scheduler: Any) -> Levels:
    """(α, σ) from `scheduler.alphas_cumprod` at the timesteps, those of different values."""
    timesteps = [int(timestep) for timestep in scheduler.timesteps.unique(sorted=True).flip(0)]
    last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    products = [*(float(scheduler.alphas_cumprod[timestep]) for timestep in timesteps), last]
    return [(math.sqrt(product), math.sqrt(1 - product)) for product in products]


def from_betas(scheduler: Any) -> Levels:
    return [(float(a), float(b)) for a, b in zip(scheduler.alphas, scheduler.betas, strict=True)]


def from_blocks(levels: Callable[[Any], Levels]) -> Callable[[Any], Levels]:
    """(α, σ) where the first-order calls of a singlestep solver start, and at the end."""

    def of_blocks(scheduler: Any) -> Levels:
        every = levels(scheduler)
        return [every[at] for at, order in enumerate(scheduler.order_list) if order == 1] + every[-1:]

    return of_blocks


def from_runge_kutta(scheduler: Any) -> Levels:
    """(α, σ) of PNDM: three steps of four calls each, then one call a step."""
    timesteps = [int(timestep) for timestep in scheduler.timesteps]
    timesteps = [*timesteps[:12:4], *timesteps[12:]]
    products = [*(float(scheduler.alphas_cumprod[at]) for at in timesteps), float(scheduler.final_alpha_cumprod)]
    return [(math.sqrt(product), math.sqrt(1 - product)) for product in products]


def from_angles(scheduler: Any) -> Levels:
    """(α, σ) of TrigFlow, whose timesteps are angles."""
    return [(math.cos(angle), math.sin(angle)) for angle in scheduler.timesteps.tolist()]


def by_epsilon(alpha: float, sigma: float) -> float:
    return 1 / alpha


def by_sample(alpha: float, sigma: float) -> float:
    return 0.0


def by_v(alpha: float, sigma: float) -> float:
    return alpha / (alpha**2 + sigma**2)


def by_flow(alpha: float, sigma: float) -> float:
    return 1.0


def by_edm(data: float) -> Callable[[float, float], float]:
    return lambda alpha, sigma: data**2 / (sigma**2 + data**2)


def growth(before: tuple[float, float], after: tuple[float, float]) -> float:
    """e^h, by which α/σ grows in a step."""
    return after[0] * before[1] / (after[1] * before[0])


def renoised(before, after, timestep) -> float:
    """Of steps that follow the reverse SDE: DDPM, the SDE forms of DPM-Solver++."""
    return 1 / growth(before, after)


def renoised_epsilon(before, after, timestep) -> float:
    """Of sde-dpmsolver, which doubles the predicted noise's part."""
    return 2 - growth(before, after)


def ancestral(before, after, timestep) -> float:
    """σ_down / σ' of Euler ancestral in unscaled latents."""
    return after[1] / before[1]


def forgotten(before, after, timestep) -> float:
    """Of consistency models: all noise is new."""
    return 0.0


def flow_ancestral(before, after, timestep) -> float:
    """Of LTX's ancestral steps with η = 1: down to σ'²/σ, then scaled to α' and noised."""
    down = after[1] ** 2 / before[1]
    return after[0] * down / (1 - down) / after[1]


def sa_data(before, after, timestep) -> float:
    tau = 1 if 200 <= timestep <= 800 else 0
    return growth(before, after) ** -(tau**2)


def sa_noise(before, after, timestep) -> float:
    tau = 1 if 200 <= timestep <= 800 else 0
    return 1 - tau**2 * (growth(before, after) - 1)


def walk(
    scheduler: Any,
    outputs: torch.Tensor,
    start: torch.Tensor,
    entry: int | None = None,
    shift: torch.Tensor | None = None,
    step: Callable[..., Any] | None = None,
    begin: int = 0,
) -> list[torch.Tensor]:
    """Samples with fixed model outputs; before the call number `entry` the latents are moved by `shift`.

    Args:
        scheduler: a scheduler after `set_timesteps`.
        outputs: what the model says at each entry of the schedule.
        start: the noise.
        entry: the entry at which the latents are moved.
        shift: the move.
        step: called in place of the scheduler's step at `entry`, with the scheduler and the arguments without the
            move; by default the latents are moved and the stock step is called.
        begin: the first entry of a schedule that is cut at the front.

    Returns:
        The latents after each call.
    """
    accepted = inspect.signature(type(scheduler).step).parameters
    extra = {"generator": torch.Generator().manual_seed(3)} if "generator" in accepted else {}
    latents, old, seen = start, None, []
    timesteps = list(scheduler.timesteps)[begin : len(outputs)]
    for number, timestep in enumerate(timesteps, begin):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(latents, timestep)
        arguments = {"model_output": outputs[number], "timestep": timestep, "sample": latents, **extra}
        if "old_pred_original_sample" in accepted:
            arguments["old_pred_original_sample"] = old
            arguments["timestep_back"] = timesteps[number - begin - 1] if number > begin else None
        arguments["return_dict"] = False
        if number == entry and step is not None:
            result = step(scheduler, arguments)
        else:
            if number == entry:
                arguments["sample"] = latents + shift
            result = scheduler.step(**arguments)
        latents = result[0]
        old = result[1] if "old_pred_original_sample" in accepted else None
        seen.append(latents)
    return seen
