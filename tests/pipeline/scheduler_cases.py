"""Schedulers of diffusers in the configurations that are tested, and what a move of their latents has to become.

The rule is stated here on its own, from the schedulers' public schedules: latents are αx₀ + σε; with the model's output
held fixed a move δ is a move Δ of x₀ and e of the noise, δ = αΔ + σe; a step makes α'Δ + rσ'e of it, where r is what a
stochastic step leaves of the noise that was there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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
            rest = (
                self.kept(before, after, self.timestep(scheduler, step)) * after[1]
                if after[1]
                else 0.0
            )
            size *= after[0] * x0 + rest * noise
            sizes.append(size)
        return sizes

    @staticmethod
    def timestep(scheduler: Any, step: int) -> float:
        return float(scheduler.timesteps[step]) if step < len(scheduler.timesteps) else 0.0

    def __str__(self) -> str:
        config = ",".join(
            f"{key}={value}" for key, value in self.config.items() if key not in _BETAS
        )
        return f"{self.scheduler}({config})"


_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def _from_sigmas(
    unscaled: bool = False, flow: bool = False, calls: bool = False
) -> Callable[[Any], Levels]:
    """(α, σ) from `scheduler.sigmas`: unscaled latents x₀ + σε, variance-preserving ones, or flows (1−σ)x₀ + σε."""

    def levels(scheduler: Any) -> Levels:
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        if calls:  # schedulers with several calls a step repeat the inner ones
            sigmas = [
                sigma for at, sigma in enumerate(sigmas) if at == 0 or sigma != sigmas[at - 1]
            ]
        if flow:
            return [(1 - sigma, sigma) for sigma in sigmas]
        if unscaled:
            return [(1.0, sigma) for sigma in sigmas]
        return [(1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)) for sigma in sigmas]

    return levels


def _from_alphas(scheduler: Any) -> Levels:
    """(α, σ) from `scheduler.alphas_cumprod` at the timesteps, those of different values."""
    timesteps = [int(timestep) for timestep in scheduler.timesteps.unique(sorted=True).flip(0)]
    last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    products = [*(float(scheduler.alphas_cumprod[timestep]) for timestep in timesteps), last]
    return [(math.sqrt(product), math.sqrt(1 - product)) for product in products]


def _from_betas(scheduler: Any) -> Levels:
    return [(float(a), float(b)) for a, b in zip(scheduler.alphas, scheduler.betas, strict=True)]


def _from_blocks(levels: Callable[[Any], Levels]) -> Callable[[Any], Levels]:
    """(α, σ) where the first-order calls of a singlestep solver start, and at the end."""

    def of_blocks(scheduler: Any) -> Levels:
        every = levels(scheduler)
        return [every[at] for at, order in enumerate(scheduler.order_list) if order == 1] + every[
            -1:
        ]

    return of_blocks


def _from_runge_kutta(scheduler: Any) -> Levels:
    """(α, σ) of PNDM: three steps of four calls each, then one call a step."""
    timesteps = [int(timestep) for timestep in scheduler.timesteps]
    timesteps = [*timesteps[:12:4], *timesteps[12:]]
    products = [
        *(float(scheduler.alphas_cumprod[at]) for at in timesteps),
        float(scheduler.final_alpha_cumprod),
    ]
    return [(math.sqrt(product), math.sqrt(1 - product)) for product in products]


def _from_angles(scheduler: Any) -> Levels:
    """(α, σ) of TrigFlow, whose timesteps are angles."""
    return [(math.cos(angle), math.sin(angle)) for angle in scheduler.timesteps.tolist()]


def _epsilon(alpha: float, sigma: float) -> float:
    return 1 / alpha


def _sample(alpha: float, sigma: float) -> float:
    return 0.0


def _v(alpha: float, sigma: float) -> float:
    return alpha / (alpha**2 + sigma**2)


def _flow(alpha: float, sigma: float) -> float:
    return 1.0


def _edm(data: float) -> Callable[[float, float], float]:
    return lambda alpha, sigma: data**2 / (sigma**2 + data**2)


def _growth(before: tuple[float, float], after: tuple[float, float]) -> float:
    """e^h, by which α/σ grows in a step."""
    return after[0] * before[1] / (after[1] * before[0])


def _renoised(before, after, timestep) -> float:
    """Of steps that follow the reverse SDE: DDPM, the SDE forms of DPM-Solver++."""
    return 1 / _growth(before, after)


def _renoised_epsilon(before, after, timestep) -> float:
    """Of sde-dpmsolver, which doubles the predicted noise's part."""
    return 2 - _growth(before, after)


def _ancestral(before, after, timestep) -> float:
    """σ_down / σ' of Euler ancestral in unscaled latents."""
    return after[1] / before[1]


def _forgotten(before, after, timestep) -> float:
    """Of consistency models: all noise is new."""
    return 0.0


def _flow_ancestral(before, after, timestep) -> float:
    """Of LTX's ancestral steps with η = 1: down to σ'²/σ, then scaled to α' and noised."""
    down = after[1] ** 2 / before[1]
    return after[0] * down / (1 - down) / after[1]


def _sa_data(before, after, timestep) -> float:
    tau = 1 if 200 <= timestep <= 800 else 0
    return _growth(before, after) ** -(tau**2)


def _sa_noise(before, after, timestep) -> float:
    tau = 1 if 200 <= timestep <= 800 else 0
    return 1 - tau**2 * (_growth(before, after) - 1)


def _multistep(name: str, flow: bool = True, **config: Any) -> list[Case]:
    """The prediction types of a multistep solver in variance-preserving latents, and of flows."""
    cases = [
        Case(name, {"prediction_type": "epsilon", **_BETAS, **config}, _from_sigmas(), _epsilon),
        Case(name, {"prediction_type": "sample", **_BETAS, **config}, _from_sigmas(), _sample),
        Case(
            name,
            {"prediction_type": "v_prediction", **_BETAS, **config},
            _from_sigmas(),
            _v,
            lasting=False,
        ),
    ]
    if flow:
        settings = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        }
        cases.append(Case(name, {**settings, **config}, _from_sigmas(flow=True), _flow))
    return cases


def _stochastic(case: Case, kept: Callable[..., float]) -> Case:
    """A case whose steps draw noise: a part of the move that is noise fades, and outputs that hold it do not go on as before."""
    steady = (_epsilon, _sample) if kept in (_renoised, _sa_data) else (_epsilon,)
    lasting = case.prediction in steady
    return Case(case.scheduler, case.config, case.levels, case.prediction, kept, lasting)


def _memory_cases() -> list[Case]:
    cases = []
    for order in (1, 2, 3):
        cases += _multistep("UniPCMultistepScheduler", solver_order=order)
        cases += _multistep("DPMSolverMultistepScheduler", solver_order=order)
        cases += _multistep("DEISMultistepScheduler", solver_order=order)
    cases += _multistep(
        "UniPCMultistepScheduler", flow=False, solver_order=2, predict_x0=False, solver_type="bh1"
    )
    cases += _multistep("UniPCMultistepScheduler", disable_corrector=[0, 2])
    cases += _multistep(
        "UniPCMultistepScheduler", flow=False, use_karras_sigmas=True, final_sigmas_type="sigma_min"
    )
    cases += _multistep("DPMSolverMultistepScheduler", solver_type="heun", use_karras_sigmas=True)[
        :3
    ]
    cases += _multistep(
        "DPMSolverMultistepScheduler", lower_order_final=False, final_sigmas_type="sigma_min"
    )
    noise = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    for order in (2, 3):
        cases += _multistep("DPMSolverMultistepScheduler", flow=False, solver_order=order, **noise)
        for case in _multistep(
            "DPMSolverMultistepScheduler", solver_order=order, algorithm_type="sde-dpmsolver++"
        ):
            cases.append(_stochastic(case, _renoised))
    noise["algorithm_type"] = "sde-dpmsolver"
    cases += [
        _stochastic(case, _renoised_epsilon)
        for case in _multistep("DPMSolverMultistepScheduler", flow=False, **noise)
    ]
    for orders in ((1, 1), (2, 2), (3, 4)):
        settings = dict(zip(("predictor_order", "corrector_order"), orders, strict=True))
        cases += [
            _stochastic(case, _sa_data) for case in _multistep("SASolverScheduler", **settings)
        ]
    settings = {"flow": False, "algorithm_type": "noise_prediction"}
    cases += [_stochastic(case, _sa_noise) for case in _multistep("SASolverScheduler", **settings)]
    unscaled = _from_sigmas(unscaled=True)
    for kind in ("epsilon", "v_prediction"):
        # What the network predicts is not the noise: the sample has a part in x₀ of its own, c_skip.
        edm = {"prediction_type": kind}
        cases += [
            Case(
                "EDMDPMSolverMultistepScheduler",
                {**edm, "solver_order": order},
                unscaled,
                _edm(0.5),
                lasting=False,
            )
            for order in (2, 3)
        ]
        cases.append(
            Case(
                "EDMDPMSolverMultistepScheduler",
                {**edm, "algorithm_type": "sde-dpmsolver++"},
                unscaled,
                _edm(0.5),
                _renoised,
                lasting=False,
            )
        )
        cases.append(
            Case(
                "CosineDPMSolverMultistepScheduler",
                edm,
                unscaled,
                _edm(1.0),
                _renoised,
                lasting=False,
            )
        )
    cases += [
        Case("LMSDiscreteScheduler", {**_BETAS, "prediction_type": "epsilon"}, unscaled, _epsilon),
        Case("LMSDiscreteScheduler", {**_BETAS, "prediction_type": "sample"}, unscaled, _sample),
        Case("LMSDiscreteScheduler", {**_BETAS, "prediction_type": "v_prediction"}, unscaled, _v, lasting=False),
        Case("IPNDMScheduler", {}, _from_betas, _v, lasting=False),
        Case("HeliosScheduler", {"stages": 1, "scheduler_type": "unipc", "use_flow_sigmas": True},
             _from_sigmas(flow=True), _flow),
    ]  # fmt: skip
    for kind, prediction in (("epsilon", _epsilon), ("sample", _sample), ("v_prediction", _v)):
        cases.append(
            Case(
                "CogVideoXDPMScheduler", {"prediction_type": kind, "rescale_betas_zero_snr": False,
                                          "timestep_spacing": "trailing"},
                _from_alphas, prediction, _renoised, lasting=kind != "v_prediction",
            )
        )  # fmt: skip
    return cases


def _given_cases() -> list[Case]:
    """Schedulers whose first call starts from the sample that it is given."""
    unscaled, twice = _from_sigmas(unscaled=True), _from_sigmas(unscaled=True, calls=True)
    singlestep = [
        replace(case, levels=_from_blocks(case.levels))
        for order in (1, 2, 3)
        for final in (False, True)
        for case in _multistep(
            "DPMSolverSinglestepScheduler", solver_order=order, lower_order_final=final
        )
        if case.prediction is not _v
    ]
    return [
        *(Case(name, {**_BETAS, "prediction_type": "epsilon"}, twice, _epsilon) for name in (
            "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")),
        Case("DPMSolverSDEScheduler", {**_BETAS, "noise_sampler_seed": 5}, twice, _epsilon),
        Case("HeunDiscreteScheduler", {**_BETAS, "use_karras_sigmas": True}, twice, _epsilon),
        Case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, _from_sigmas(flow=True, calls=True), _flow),
        Case("PNDMScheduler", {**_BETAS, "skip_prk_steps": True}, _from_alphas, _epsilon),
        Case("PNDMScheduler", {**_BETAS, "skip_prk_steps": True, "prediction_type": "v_prediction"},
             _from_alphas, _v),
        Case("PNDMScheduler", {**_BETAS, "skip_prk_steps": False}, _from_runge_kutta, _epsilon),
        Case("EulerDiscreteScheduler", _BETAS, unscaled, _epsilon),
        Case("EulerDiscreteScheduler", {**_BETAS, "prediction_type": "v_prediction"}, unscaled, _v),
        Case("EulerAncestralDiscreteScheduler", {**_BETAS, "prediction_type": "v_prediction"}, unscaled, _v, _ancestral),
        Case("EDMEulerScheduler", {}, unscaled, _edm(0.5)),
        Case("DDIMScheduler", {**_BETAS, "clip_sample": False}, _from_alphas, _epsilon),
        Case("DDIMParallelScheduler", {**_BETAS, "clip_sample": False}, _from_alphas, _epsilon),
        Case("CogVideoXDDIMScheduler", {**_BETAS, "prediction_type": "v_prediction"}, _from_alphas, _v),
        Case("DDPMScheduler", {**_BETAS, "clip_sample": False}, _from_alphas, _epsilon, _renoised),
        Case("DDPMParallelScheduler", {**_BETAS, "clip_sample": False}, _from_alphas, _epsilon, _renoised),
        Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, _from_sigmas(flow=True), _flow),
        Case("FlowMapEulerDiscreteScheduler", {"shift": 3.0}, _from_sigmas(flow=True), _flow),
        Case("HeliosScheduler", {"stages": 1, "scheduler_type": "euler"}, _from_sigmas(flow=True), _flow),
        Case("FlowMatchLCMScheduler", {"shift": 3.0}, _from_sigmas(flow=True), _flow, _forgotten),
        Case("LTXEulerAncestralRFScheduler", {}, _from_sigmas(flow=True), _flow, _flow_ancestral),
        Case("MiniMaxH3Scheduler", {"shift": 3.0}, _from_sigmas(flow=True), _flow),
        Case("SCMScheduler", {}, _from_angles, _v, _forgotten),
        *singlestep,
    ]  # fmt: skip


MEMORY = _memory_cases()
GIVEN = _given_cases()


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
        step: called in place of the scheduler's step at `entry`, with the scheduler and the arguments without the move; by
            default the latents are moved and the stock step is called.
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
        arguments = {
            "model_output": outputs[number],
            "timestep": timestep,
            "sample": latents,
            **extra,
        }
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
