"""Which schedulers let latents be moved before a step, at which entries of the schedule, and how the step then goes.

Guidance methods move the latents and let the scheduler step on from there. Many schedulers do not start a step from
the sample that they are given: the second call of a Heun step starts from the sample of the first, a corrector starts
from the sample of the step before, and multistep solvers extrapolate from predictions that belong to latents nobody
moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.scheduler_memory import corrector_moved, list_moved, moved, output_change, prediction_change


class Kind(Enum):
    """What a scheduler remembers from one call of `step` to the next."""

    ONE_CALL = "nothing: a step is one call, which starts from the sample that it is given"
    CALLS = "the sample of the first of `order` calls, from which the others start as well"
    PNDM = "the sample of the first call of its Runge-Kutta and doubled first steps; raw model outputs"
    SINGLESTEP = "the sample of the first-order call, from which the calls of higher order start as well"
    MULTISTEP = "the converted outputs of earlier steps"
    CORRECTOR = "the converted outputs of earlier steps, and the sample that its corrector starts from"
    DERIVATIVES = "the derivatives of earlier steps"
    ARGUMENT = "nothing itself: the pipeline hands it the prediction of the step before"


# Class names and not classes: some exist only where scipy or torchsde are installed.
KINDS = {
    "CMStochasticIterativeScheduler": Kind.ONE_CALL,
    "CogVideoXDDIMScheduler": Kind.ONE_CALL,
    "CogVideoXDPMScheduler": Kind.ARGUMENT,
    "CosineDPMSolverMultistepScheduler": Kind.MULTISTEP,
    "DDIMParallelScheduler": Kind.ONE_CALL,
    "DDIMScheduler": Kind.ONE_CALL,
    "DDPMParallelScheduler": Kind.ONE_CALL,
    "DDPMScheduler": Kind.ONE_CALL,
    "DEISMultistepScheduler": Kind.MULTISTEP,
    "DPMSolverMultistepScheduler": Kind.MULTISTEP,
    "DPMSolverSDEScheduler": Kind.CALLS,
    "DPMSolverSinglestepScheduler": Kind.SINGLESTEP,
    "EDMDPMSolverMultistepScheduler": Kind.MULTISTEP,
    "EDMEulerScheduler": Kind.ONE_CALL,
    "EulerAncestralDiscreteScheduler": Kind.ONE_CALL,
    "EulerDiscreteScheduler": Kind.ONE_CALL,
    "FlowMapEulerDiscreteScheduler": Kind.ONE_CALL,
    "FlowMatchEulerDiscreteScheduler": Kind.ONE_CALL,
    "FlowMatchHeunDiscreteScheduler": Kind.CALLS,
    "FlowMatchLCMScheduler": Kind.ONE_CALL,
    "HeliosDMDScheduler": Kind.ONE_CALL,
    "HeliosScheduler": Kind.CORRECTOR,
    "HeunDiscreteScheduler": Kind.CALLS,
    "IPNDMScheduler": Kind.DERIVATIVES,
    "KDPM2AncestralDiscreteScheduler": Kind.CALLS,
    "KDPM2DiscreteScheduler": Kind.CALLS,
    "LCMScheduler": Kind.ONE_CALL,
    "LMSDiscreteScheduler": Kind.DERIVATIVES,
    "LTXEulerAncestralRFScheduler": Kind.ONE_CALL,
    "MiniMaxH3Scheduler": Kind.ONE_CALL,
    "PNDMScheduler": Kind.PNDM,
    "PiflowScheduler": Kind.ONE_CALL,
    "SASolverScheduler": Kind.CORRECTOR,
    "SCMScheduler": Kind.ONE_CALL,
    "TCDScheduler": Kind.ONE_CALL,
    "UniPCMultistepScheduler": Kind.CORRECTOR,
}

_DISCRETE = "it samples discrete tokens, which have no latents to move"
_INVERSE = "it walks from clean latents to noise, and guidance belongs to the way back"
_IMAGES = "its step is not the `step(model_output, timestep, sample)` of a video pipeline"
REFUSED = {
    "AmusedScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "ConsistencyDecoderScheduler": "it decodes images from latents and does not sample latents",
    "DDIMInverseScheduler": _INVERSE,
    "DDPMWuerstchenScheduler": _IMAGES,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "DiscreteDDIMScheduler": _DISCRETE,
    "EntropyBoundScheduler": _DISCRETE,
    "KarrasVeScheduler": _IMAGES,
    "RFD4ProteinaScheduler": "it samples protein structures",
    "RePaintScheduler": "it pastes a known image over the latents at each step and goes back to more noise between "
    "them",
    "ScoreSdeVeScheduler": _IMAGES,
    "ScoreSdeVpScheduler": _IMAGES,
    "UnCLIPScheduler": "it samples the image embeddings and images of unCLIP",
    "VQDiffusionScheduler": _DISCRETE,
}

# What schedulers name the things that they keep from call to call, in diffusers and in copies of its classes.
_SIGNS_OF_MEMORY = (
    "cur_sample",
    "derivatives",
    "ets",
    "last_sample",
    "model_outputs",
    "prev_derivative",
    "sample",
    "state_in_first_order",
)
_INSTEAD = "use DDIMScheduler, EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler, as fits the model"


@dataclass(frozen=True)
class Place:
    """One entry of a schedule: the step that it belongs to, and whether latents may be moved at it.

    Attributes:
        step: the number of the whole step, 0 first; all calls of a step with several calls have the same number.
        leading: True at the call of a step at which a move of the latents takes effect.
    """

    step: int
    leading: bool


def places_of(scheduler: Any, start: int = 0) -> list[Place]:
    """Says for each entry of `scheduler.timesteps` from `start` on to which step it belongs and whether it leads it.

    The first call of a step leads it. Of Heun, KDPM2 and DPM-Solver SDE schedulers every second entry leads (the last
    step has one call only); of PNDM the second entry repeats the first step, and Runge-Kutta steps have four calls; of
    DPM-Solver singlestep the entries of first order lead. Elsewhere each entry is a step.

    Args:
        scheduler: a scheduler after its `set_timesteps`.
        start: the entry at which the run begins, where a pipeline cuts the schedule (`strength` of video-to-video).
            The calls are counted from there, as schedulers do: PNDM repeats its first call wherever it is.

    Returns:
        One `Place` per entry of `scheduler.timesteps[start:]`; the steps count from 0.

    Raises:
        ArgumentError: for a scheduler without timesteps, or a start outside them.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not 0 <= start < len(timesteps):
        entries = "no timesteps (call set_timesteps)" if timesteps is None else f"{len(timesteps)} timesteps"
        raise ArgumentError(f"start={start}: {type(scheduler).__name__} has {entries}")
    leads = [_leads(scheduler, entry - start, entry) for entry in range(start, len(timesteps))]
    return [Place(step - 1, lead) for step, lead in zip(accumulate(leads), leads, strict=True)]


def check_scheduler(scheduler: Any) -> None:
    """Refuses a scheduler with which "move the latents, then step" cannot be made to hold.

    Subclasses of diffusers' schedulers count as their nearest base. Another class is taken as one call a step that
    starts from the given sample, as most are, unless it shows signs of memory (an `order` above 1, or attributes like
    `model_outputs`, `last_sample`, `derivatives`): what such a class does with moved latents is unknown.

    Raises:
        ArgumentError: naming the class, the reason and what to use instead.
    """
    kind_of(scheduler)
    inner = getattr(scheduler, "solver_p", None)
    if inner is not None and kind_of(inner) in (Kind.CALLS, Kind.PNDM, Kind.SINGLESTEP, Kind.ARGUMENT):
        raise ArgumentError(
            f"scheduler {type(scheduler).__name__}: solver_p={type(inner).__name__} keeps {kind_of(inner).value}; "
            "use a solver_p with one call a step, or none"
        )


def kind_of(scheduler: Any) -> Kind:
    """Finds what a scheduler remembers, by the nearest class in its bases that is known.

    Raises:
        ArgumentError: as `check_scheduler` does.
    """
    name, base = type(scheduler).__name__, _nearest(scheduler)
    if base in KINDS:
        return KINDS[base]
    if base in REFUSED:
        raise ArgumentError(f"scheduler {name}: latents cannot be moved: {REFUSED[base]}; {_INSTEAD}")
    signs = [sign for sign in _SIGNS_OF_MEMORY if hasattr(scheduler, sign)]
    if getattr(scheduler, "order", 1) != 1:
        signs.append(f"order={scheduler.order}")
    if signs or not callable(getattr(scheduler, "step", None)):
        raise ArgumentError(
            f"scheduler {name}: latents cannot be moved: the class is unknown and keeps something from call to call "
            f"({', '.join(signs) or 'it has no step'}); {_INSTEAD}, or a subclass of a scheduler of diffusers"
        )
    return Kind.ONE_CALL


def moved_step(step: Callable[..., Any], scheduler: Any, arguments: dict[str, Any], shift: torch.Tensor) -> Any:
    """Calls a scheduler's `step` as if its sample had been `sample + shift` all along.

    With the model's output held fixed, a move δ of the latents αx₀ + σε is a move Δ of the predicted x₀ and e of the
    predicted noise, δ = αΔ + σe: Δ = δ/α, e = 0 for ε-prediction; Δ = e = δ for flows; Δ = 0 for x₀-prediction; Δ =
    αδ, e = σδ for v-prediction. After the step it is α'Δ + σ'e (stochastic steps replace a part of e by new noise).
    Solvers with a memory make the same of it if what they remember moves along: earlier predictions of x₀ by Δ, of the
    noise by e. A corrector works on what was there before the move, and its result is moved. Under ε-prediction,
    x₀-prediction and flows this goes on to the end of a deterministic schedule; otherwise later steps follow to the
    order of the solver.

    How the model answers the move is in its output, which the caller computes at the moved latents; how it would have
    answered in the steps before is unknown, and the outputs of those steps stay as they are. Only the scheduler's
    memory is changed, and nothing if the step raises.

    Args:
        step: the scheduler's own bound `step`.
        scheduler: the scheduler, at a call that leads a step (see `places_of`).
        arguments: the arguments of `step` by name, `sample` without the move among them. Its batch may be a multiple
            of the shift's (branches of classifier-free guidance in one call): each part is moved.
        shift: δ, of the sample's shape.

    Returns:
        What `step` returned.

    Raises:
        ArgumentError: for a shift of another shape, a call that does not lead its step, and as `check_scheduler` does.
    """
    kind = kind_of(scheduler)
    sample = arguments["sample"]
    if not _at_leading_call(scheduler, kind):
        raise ArgumentError(
            f"shift: this call of {type(scheduler).__name__}.step starts from an earlier sample and does not carry a "
            "move of this one; move latents where places_of says leading"
        )
    shift = _like(shift, sample)
    moved_arguments = {**arguments, "sample": moved(sample, shift)}
    if kind is Kind.ARGUMENT and arguments.get("old_pred_original_sample") is not None:
        moved_arguments["old_pred_original_sample"] = moved(
            arguments["old_pred_original_sample"], prediction_change(step, arguments, shift)
        )
    with _memory_moved(scheduler, arguments, shift):
        return step(**moved_arguments)


@contextmanager
def _memory_moved(scheduler: Any, arguments: dict[str, Any], shift: torch.Tensor) -> Iterator[None]:
    """Moves what a scheduler remembers, for the step inside and those after it; undone if the step raises."""
    kind = kind_of(scheduler)
    if kind is Kind.DERIVATIVES:
        with list_moved(scheduler, arguments, shift):
            yield
    elif kind in (Kind.MULTISTEP, Kind.CORRECTOR):
        inner = getattr(scheduler, "solver_p", None)
        change = output_change(scheduler, arguments, shift)
        with corrector_moved(scheduler, change, shift):
            if inner is None:
                yield
            else:
                with _memory_moved(inner, arguments, shift):
                    yield
    else:
        yield


def _nearest(scheduler: Any) -> str:
    """The name of the nearest class in a scheduler's bases that is known, its own name where none is."""
    names = [base.__name__ for base in type(scheduler).__mro__]
    return next((name for name in names if name in KINDS or name in REFUSED), names[0])


def _leads(scheduler: Any, calls: int, entry: int) -> bool:
    """Whether the call number `calls` of a run, at this entry of the schedule, is the first of a step."""
    kind = KINDS.get(_nearest(scheduler))
    if kind is Kind.PNDM:
        if not scheduler.config.skip_prk_steps and calls < len(scheduler.prk_timesteps):
            return calls % 4 == 0
        return calls != 1
    if kind is Kind.SINGLESTEP:
        return min(scheduler.order_list[entry], calls + 1) == 1
    return calls % getattr(scheduler, "order", 1) == 0


def _at_leading_call(scheduler: Any, kind: Kind) -> bool:
    """Whether the next call of `step` is the first of a step, from the scheduler's own counters."""
    if kind is Kind.CALLS:
        return scheduler.state_in_first_order
    if kind is Kind.PNDM:
        return _leads(scheduler, scheduler.counter, scheduler.counter)
    if kind is Kind.SINGLESTEP and scheduler.step_index is not None:
        kept = sum(output is not None for output in scheduler.model_outputs)
        return _leads(scheduler, kept, scheduler.step_index)
    return True


def _like(shift: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The shift for each part of the sample's batch, in float32 or better, on the sample's device."""
    parts, rest = divmod(sample.shape[0], shift.shape[0]) if shift.dim() == sample.dim() else (0, 0)
    if rest or not parts or shift.shape[1:] != sample.shape[1:]:
        raise ArgumentError(f"shift: shape {tuple(shift.shape)}, the sample has {tuple(sample.shape)}")
    dtype = torch.promote_types(shift.dtype, torch.float32)
    return shift.to(sample.device, dtype).repeat(parts, *[1] * (sample.dim() - 1))
