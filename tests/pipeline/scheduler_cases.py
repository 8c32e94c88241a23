"""The schedulers of diffusers in the configurations that are tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .scheduler_rules import (
    BETAS,
    Case,
    ancestral,
    by_edm,
    by_epsilon,
    by_flow,
    by_sample,
    by_v,
    flow_ancestral,
    forgotten,
    from_alphas,
    from_angles,
    from_betas,
    from_blocks,
    from_runge_kutta,
    from_sigmas,
    renoised,
    renoised_epsilon,
    sa_data,
    sa_noise,
)


def _multistep(name: str, flow: bool = True, **config: Any) -> list[Case]:
    """The prediction types of a multistep solver in variance-preserving latents, and of flows."""
    cases = [
        Case(name, {"prediction_type": "epsilon", **BETAS, **config}, from_sigmas(), by_epsilon),
        Case(name, {"prediction_type": "sample", **BETAS, **config}, from_sigmas(), by_sample),
        Case(name, {"prediction_type": "v_prediction", **BETAS, **config}, from_sigmas(), by_v, lasting=False),
    ]
    if flow:
        settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        cases.append(Case(name, {**settings, **config}, from_sigmas(flow=True), by_flow))
    return cases


def _stochastic(case: Case, kept: Callable[..., float]) -> Case:
    """A case whose steps draw noise: the part of a move that is noise fades, and what holds it does not go on as it
    was.
    """
    steady = (by_epsilon, by_sample) if kept in (renoised, sa_data) else (by_epsilon,)
    lasting = case.prediction in steady
    return Case(case.scheduler, case.config, case.levels, case.prediction, kept, lasting)


def _memory_cases() -> list[Case]:
    cases = []
    for order in (1, 2, 3):
        cases += _multistep("UniPCMultistepScheduler", solver_order=order)
        cases += _multistep("DPMSolverMultistepScheduler", solver_order=order)
        cases += _multistep("DEISMultistepScheduler", solver_order=order)
    cases += _multistep(
        "UniPCMultistepScheduler",
        flow=False,
        solver_order=2,
        predict_x0=False,
        final_sigmas_type="sigma_min",
        solver_type="bh1",
    )
    cases += _multistep("UniPCMultistepScheduler", disable_corrector=[0, 2])
    cases += _multistep("UniPCMultistepScheduler", flow=False, use_karras_sigmas=True)
    cases += _multistep("DPMSolverMultistepScheduler", solver_type="heun", use_karras_sigmas=True)[:3]
    cases += _multistep("DPMSolverMultistepScheduler", lower_order_final=False, final_sigmas_type="sigma_min")
    noise = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    for order in (2, 3):
        cases += _multistep("DPMSolverMultistepScheduler", flow=False, solver_order=order, **noise)
        for case in _multistep("DPMSolverMultistepScheduler", solver_order=order, algorithm_type="sde-dpmsolver++"):
            cases.append(_stochastic(case, renoised))
    noise["algorithm_type"] = "sde-dpmsolver"
    cases += [
        _stochastic(case, renoised_epsilon) for case in _multistep("DPMSolverMultistepScheduler", flow=False, **noise)
    ]
    for orders in ((1, 1), (2, 2), (3, 4)):
        settings = dict(zip(("predictor_order", "corrector_order"), orders, strict=True))
        cases += [_stochastic(case, sa_data) for case in _multistep("SASolverScheduler", **settings)]
    settings = {"flow": False, "algorithm_type": "noise_prediction"}
    cases += [_stochastic(case, sa_noise) for case in _multistep("SASolverScheduler", **settings)]
    unscaled = from_sigmas(unscaled=True)
    for kind in ("epsilon", "v_prediction"):
        # What the network predicts is not the noise: the sample has a part in x₀ of its own, c_skip.
        edm = {"prediction_type": kind}
        cases += [
            Case(
                "EDMDPMSolverMultistepScheduler", {**edm, "solver_order": order}, unscaled, by_edm(0.5), lasting=False
            )
            for order in (2, 3)
        ]
        cases.append(
            Case(
                "EDMDPMSolverMultistepScheduler",
                {**edm, "algorithm_type": "sde-dpmsolver++"},
                unscaled,
                by_edm(0.5),
                renoised,
                lasting=False,
            )
        )
        cases.append(Case("CosineDPMSolverMultistepScheduler", edm, unscaled, by_edm(1.0), renoised, lasting=False))
    cases += [
        Case("LMSDiscreteScheduler", {**BETAS, "prediction_type": "epsilon"}, unscaled, by_epsilon),
        Case("LMSDiscreteScheduler", {**BETAS, "prediction_type": "sample"}, unscaled, by_sample),
        Case("LMSDiscreteScheduler", {**BETAS, "prediction_type": "v_prediction"}, unscaled, by_v, lasting=False),
        Case("IPNDMScheduler", {}, from_betas, by_v, lasting=False),
        Case(
            "HeliosScheduler",
            {"stages": 1, "scheduler_type": "unipc", "use_flow_sigmas": True},
            from_sigmas(flow=True),
            by_flow,
        ),
    ]
    for kind, prediction in (("epsilon", by_epsilon), ("sample", by_sample), ("v_prediction", by_v)):
        cases.append(
            Case(
                "CogVideoXDPMScheduler",
                {"prediction_type": kind, "rescale_betas_zero_snr": False, "timestep_spacing": "trailing"},
                from_alphas,
                prediction,
                renoised,
                lasting=kind != "v_prediction",
            )
        )
    return cases


def _given_cases() -> list[Case]:
    """Schedulers whose first call starts from the sample that it is given."""
    unscaled, twice = from_sigmas(unscaled=True), from_sigmas(unscaled=True, calls=True)
    singlestep = [
        replace(case, levels=from_blocks(case.levels))
        for order in (1, 2, 3)
        for final in (False, True)
        for case in _multistep("DPMSolverSinglestepScheduler", solver_order=order, lower_order_final=final)
        if case.prediction is not by_v
    ]
    return [
        *(
            Case(name, {**BETAS, "prediction_type": "epsilon"}, twice, by_epsilon)
            for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
        ),
        Case("DPMSolverSDEScheduler", {**BETAS, "noise_sampler_seed": 5}, twice, by_epsilon),
        Case("HeunDiscreteScheduler", {**BETAS, "use_karras_sigmas": True}, twice, by_epsilon),
        Case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, from_sigmas(flow=True, calls=True), by_flow),
        Case("PNDMScheduler", {**BETAS, "skip_prk_steps": True}, from_alphas, by_epsilon),
        Case("PNDMScheduler", {**BETAS, "skip_prk_steps": True, "prediction_type": "v_prediction"}, from_alphas, by_v),
        Case("PNDMScheduler", {**BETAS, "skip_prk_steps": False}, from_runge_kutta, by_epsilon),
        Case("EulerDiscreteScheduler", BETAS, unscaled, by_epsilon),
        Case("EulerDiscreteScheduler", {**BETAS, "prediction_type": "v_prediction"}, unscaled, by_v),
        Case(
            "EulerAncestralDiscreteScheduler", {**BETAS, "prediction_type": "v_prediction"}, unscaled, by_v, ancestral
        ),
        Case("EDMEulerScheduler", {}, unscaled, by_edm(0.5)),
        Case("DDIMScheduler", {**BETAS, "clip_sample": False}, from_alphas, by_epsilon),
        Case("DDIMParallelScheduler", {**BETAS, "clip_sample": False}, from_alphas, by_epsilon),
        Case("CogVideoXDDIMScheduler", {**BETAS, "prediction_type": "v_prediction"}, from_alphas, by_v),
        Case("DDPMScheduler", {**BETAS, "clip_sample": False}, from_alphas, by_epsilon, renoised),
        Case("DDPMParallelScheduler", {**BETAS, "clip_sample": False}, from_alphas, by_epsilon, renoised),
        Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, from_sigmas(flow=True), by_flow),
        Case("FlowMapEulerDiscreteScheduler", {"shift": 3.0}, from_sigmas(flow=True), by_flow),
        Case("HeliosScheduler", {"stages": 1, "scheduler_type": "euler"}, from_sigmas(flow=True), by_flow),
        Case("FlowMatchLCMScheduler", {"shift": 3.0}, from_sigmas(flow=True), by_flow, forgotten),
        Case("LTXEulerAncestralRFScheduler", {}, from_sigmas(flow=True), by_flow, flow_ancestral),
        Case("MiniMaxH3Scheduler", {"shift": 3.0}, from_sigmas(flow=True), by_flow),
        Case("SCMScheduler", {}, from_angles, by_v, forgotten),
        *singlestep,
    ]


MEMORY = _memory_cases()
GIVEN = _given_cases()
