"""A step from moved latents is a step from latents that were moved all along, whatever the scheduler remembers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.schedulers import KINDS, Kind, Place, check_scheduler, moved_step, places_of

diffusers = pytest.importorskip("diffusers")

from .scheduler_cases import GIVEN, MEMORY  # noqa: E402
from .scheduler_rules import STEPS, Case, walk  # noqa: E402

SHAPE = (1, 3, 2, 4)
EPS = torch.finfo(torch.float32).eps
PUSHES = (0, 1, 2, 5, STEPS - 1)
pytestmark = pytest.mark.filterwarnings("ignore:Should have:UserWarning")  # torchsde at the ends of its schedule


def moving(shift: torch.Tensor):
    """The step at which `walk` moves the latents, by the package."""
    return lambda scheduler, arguments: moved_step(scheduler.step, scheduler, arguments, shift)


def tensors(entries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the model says at each entry, the noise and the move, in float64."""
    outputs = torch.randn(entries, *SHAPE, dtype=torch.float64)
    return outputs, *torch.randn(2, *SHAPE, dtype=torch.float64)


def runs(places: list[Place], push: int) -> tuple[int, int, list[int]]:
    """The step to push, its first entry, and the last entry of each step from it on."""
    steps = places[-1].step + 1
    step = min(push, steps - 1)
    entry = next(at for at, place in enumerate(places) if place.step == step)
    last = {place.step: at for at, place in enumerate(places)}
    return step, entry, [last[later] for later in range(step, steps)]


def errors(got: list, without: list, shift: torch.Tensor, sizes: list[float], ends: list[int]) -> list[float]:
    """How far the moves that are left after each step are from what they have to be."""
    return [float((got[end] - without[end] - size * shift).abs().max()) for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("case", MEMORY + GIVEN, ids=str)
@pytest.mark.drawn(10)
def test_a_move_goes_on_as_the_equation_says(case: Case):
    """Whichever step it is made before."""
    scheduler = case.build()
    places = places_of(scheduler)[: case.entries(scheduler)]
    outputs, start, shift = tensors(len(places))
    without = walk(scheduler, outputs, start)
    # The schedulers' coefficients are float32. What that makes of a move before the first step, when there is nothing
    # to remember, is the stock scheduler's own error; roundings of the latents and of what they predict come on top.
    stock = walk(case.build(), outputs, start, 0, shift)
    first = case.expected(scheduler, 0)
    stock_ends = runs(places, 0)[2]
    reach = len(first) if case.lasting else 1
    own = max(errors(stock, without, shift, first, stock_ends)[:reach])
    largest = max(abs(case.prediction(alpha, sigma)) for alpha, sigma in case.levels(scheduler)[:-1])
    for push in PUSHES:
        step, entry, ends = runs(places, push)
        sizes = case.expected(scheduler, step)
        moved = walk(case.build(), outputs, start, entry, step=moving(shift))
        size = max(float(latents.abs().max()) for latents in [start, *without, *moved])
        size = max(size, largest * float(shift.abs().max()))
        reach = len(sizes) if case.lasting else 1
        found = errors(moved, without, shift, sizes, ends)[:reach]
        assert all(error <= 4 * own + 64 * EPS * size for error in found), (push, found)
        before = zip(without[:entry], moved[:entry], strict=True)
        assert all(torch.equal(a, b) for a, b in before), push


@pytest.mark.parametrize("push", (1, 6, 15))
@pytest.mark.parametrize(
    "name", ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler", "IPNDMScheduler")
)
def test_a_move_under_v_prediction_stays_as_it_is_to_the_end(name: str, push: int):
    # In variance-preserving latents x = cos φ x₀ + sin φ ε with v = dx/dφ: with v fixed a move stays the same. A
    # solver of first order keeps cos Δφ of it in each step, that is, loses Δφ²/2; one of higher order is allowed twice
    # that.
    settings = {} if name == "IPNDMScheduler" else {"prediction_type": "v_prediction"}
    case = next(
        case
        for case in MEMORY
        if case.scheduler == name and case.config.get("prediction_type", None) == settings.get("prediction_type")
    )
    scheduler = case.build(30)
    outputs, start, shift = tensors(30)
    angles = [math.atan2(sigma, alpha) for alpha, sigma in case.levels(scheduler)]
    allowed = sum((a - b) ** 2 for a, b in zip(angles[push:-1], angles[push + 1 :], strict=True))
    without = walk(scheduler, outputs, start)
    moved = walk(case.build(30), outputs, start, push, step=moving(shift))
    found = errors(moved, without, shift, [1.0] * (30 - push), list(range(push, 30)))
    assert all(error <= allowed * float(shift.abs().max()) for error in found), found


@pytest.mark.drawn(6)
@pytest.mark.parametrize("case", MEMORY + GIVEN, ids=str)
def test_no_move_gives_the_stock_run(case: Case):
    scheduler = case.build()
    places = places_of(scheduler)[: case.entries(scheduler)]
    outputs, start, shift = tensors(len(places))
    stock = walk(scheduler, outputs, start)
    entry = runs(places, 2)[1]
    moved = walk(case.build(), outputs, start, entry, step=moving(torch.zeros_like(shift)))
    for without, latents in zip(stock, moved, strict=True):
        torch.testing.assert_close(latents, without, rtol=0, atol=0)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("case", MEMORY + GIVEN, ids=str)
def test_a_step_leaves_nothing_behind_even_if_it_raises(case: Case):
    scheduler = case.build()
    places = places_of(scheduler)[: case.entries(scheduler)]
    outputs, start, shift = tensors(len(places))
    _, entry, _ = runs(places, 2)
    state = {}

    def attributes(scheduler) -> dict:
        return {key: list(value) if isinstance(value, list) else value for key, value in vars(scheduler).items()}

    def breaking(scheduler, arguments):
        before = attributes(scheduler)

        def step(**_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            moved_step(step, scheduler, arguments, shift)
        for key, value in attributes(scheduler).items():
            if isinstance(value, list):
                assert len(value) == len(before[key])
                assert all(a is b for a, b in zip(value, before[key], strict=True)), key
            else:
                assert value is before[key], key
        own = scheduler.step
        result = moved_step(own, scheduler, arguments, shift)
        state["moved"] = set(vars(scheduler))
        return result

    got = walk(scheduler, outputs, start, entry, step=breaking)
    stock = case.build()
    walk(stock, outputs[: entry + 1], start)
    assert state["moved"] == set(vars(stock))
    again = walk(case.build(), outputs, start, entry, step=moving(shift))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


PLAIN = [
    name
    for name, kind in KINDS.items()
    if kind is Kind.ONE_CALL and name not in ("HeliosDMDScheduler", "PiflowScheduler")
]


@pytest.mark.parametrize("name", PLAIN)
def test_schedulers_without_a_memory_step_from_the_moved_sample(name: str):
    case = Case(name, {}, None, None)
    outputs, start, shift = (tensor.float() for tensor in tensors(case.entries(case.build())))
    moved = walk(case.build(), outputs, start, 3, step=moving(shift))
    stock = walk(case.build(), outputs, start, 3, shift)
    assert not torch.equal(moved[3], walk(case.build(), outputs, start)[3])
    assert all(torch.equal(a, b) for a, b in zip(moved, stock, strict=True))


@pytest.mark.parametrize("name", ("HeliosDMDScheduler", "PiflowScheduler"))
def test_schedulers_with_steps_of_their_own_pipelines(name: str):
    sample, output, shift, noise = torch.randn(4, 1, 3, 2, 4, 4)
    scheduler = getattr(diffusers, name)(**({"stages": 1} if name.startswith("Helios") else {}))
    scheduler.set_timesteps(4)
    arguments = {"model_output": output, "timestep": scheduler.timesteps[1], "sample": sample}
    if name == "HeliosDMDScheduler":
        arguments |= {
            "cur_sampling_step": 1,
            "dmd_noisy_tensor": noise,
            "dmd_sigmas": scheduler.sigmas,
            "dmd_timesteps": scheduler.timesteps,
            "all_timesteps": scheduler.timesteps,
        }
    else:
        arguments["model_output"] = output.repeat_interleave(scheduler.n_grid, dim=-1)
    again = copy.deepcopy(scheduler)
    stock = again.step(**{**arguments, "sample": sample + shift}).prev_sample
    assert torch.equal(moved_step(scheduler.step, scheduler, arguments, shift).prev_sample, stock)


LEADERS = [
    case
    for case in GIVEN
    if KINDS[case.scheduler] in (Kind.CALLS, Kind.PNDM, Kind.SINGLESTEP)
    and case.config.get("prediction_type", "epsilon") in ("epsilon", "flow_prediction")
]


@pytest.mark.drawn(6)
@pytest.mark.parametrize("case", LEADERS, ids=str)
def test_an_entry_leads_just_where_the_stock_scheduler_carries_the_move(case: Case):
    scheduler = case.build()
    places = places_of(scheduler)
    outputs, start, shift = tensors(len(places))
    without = walk(scheduler, outputs, start)
    fresh = case.build()
    for entry, place in enumerate(places):
        _, _, (end, *_) = runs(places, place.step)
        seen = walk(copy.deepcopy(fresh), outputs, start, entry, shift)
        (error,) = errors(seen, without, shift, case.expected(scheduler, place.step)[:1], [end])
        assert (error < 1e-3 * float(shift.abs().max())) == place.leading, (entry, error)
        if not place.leading:
            with pytest.raises(ArgumentError, match="does not carry"):
                walk(copy.deepcopy(fresh), outputs, start, entry, step=moving(shift))


@pytest.mark.parametrize("order", (1, 2, 3))
def test_a_cut_schedule_is_moved_as_a_whole_one(order: int):
    case = Case("DPMSolverSinglestepScheduler", {"solver_order": order}, None, None)
    scheduler = case.build()
    scheduler.set_begin_index(1)
    outputs, start, shift = tensors(STEPS)
    without = walk(scheduler, outputs, start, begin=1)
    for number, place in enumerate(places_of(scheduler, 1)):
        again = case.build()
        again.set_begin_index(1)
        if not place.leading:
            with pytest.raises(ArgumentError, match="does not carry"):
                walk(again, outputs, start, 1 + number, step=moving(shift), begin=1)
        else:
            moved = walk(again, outputs, start, 1 + number, step=moving(shift), begin=1)
            assert not torch.equal(moved[number], without[number])


@pytest.mark.parametrize("inner", ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"))
def test_the_predictor_that_unipc_is_given_moves_too(inner: str):
    def build():
        solver = getattr(diffusers, inner)(prediction_type="epsilon")
        scheduler = diffusers.UniPCMultistepScheduler(prediction_type="epsilon", solver_p=solver)
        scheduler.set_timesteps(STEPS)
        return scheduler

    outputs, start, shift = tensors(STEPS)
    scheduler = build()
    without, alphas = (walk(scheduler, outputs, start), 1 / (1 + scheduler.sigmas.double() ** 2).sqrt())
    for push in (1, 4):
        check_scheduler(scheduler)
        moved = walk(build(), outputs, start, push, step=moving(shift))
        sizes = (alphas[push + 1 :] / alphas[push]).tolist()
        found = errors(moved, without, shift, sizes, list(range(push, STEPS)))
        size = max(float(latents.abs().max()) for latents in [*without, *moved]) / float(alphas[0])
        assert all(error <= 64 * EPS * size for error in found), found


def test_a_predictor_of_two_calls_is_refused():
    scheduler = diffusers.UniPCMultistepScheduler(solver_p=diffusers.HeunDiscreteScheduler())
    with pytest.raises(ArgumentError, match=r"UniPCMultistepScheduler: solver_p=HeunDiscreteScheduler"):
        check_scheduler(scheduler)


def test_half_precision_and_several_branches_in_one_batch():
    def build():
        scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(STEPS)
        return scheduler

    outputs, start, shift = (tensor.to(torch.bfloat16) for tensor in tensors(STEPS))
    outputs, start = outputs.repeat(1, 2, 1, 1, 1), start.repeat(2, 1, 1, 1)
    without = walk(build(), outputs, start)
    moved = walk(build(), outputs, start, 3, step=moving(shift.float()))
    assert moved[-1].dtype == torch.bfloat16
    size = max(float(latents.abs().max()) for latents in [*without, *moved])
    for end in range(3, STEPS):
        left = moved[end].float() - without[end].float() - shift.float()
        # Each step rounds its sample, its outputs and its result to bfloat16.
        assert float(left.abs().max()) <= 4 * (end - 1) * torch.finfo(torch.bfloat16).eps * size


def test_clipped_predictions_are_moved_by_what_clipping_leaves():
    def build():
        scheduler = diffusers.DPMSolverMultistepScheduler(thresholding=True, prediction_type="epsilon")
        scheduler.set_timesteps(STEPS)
        return scheduler

    outputs, start, shift = tensors(STEPS)
    remembered = {}

    def step(scheduler, arguments):
        before = list(scheduler.model_outputs)
        plain = scheduler.convert_model_output(arguments["model_output"], sample=arguments["sample"])
        result = moved_step(scheduler.step, scheduler, arguments, shift)
        remembered["older"] = scheduler.model_outputs[0] - before[1]
        remembered["newest"] = scheduler.model_outputs[1] - plain
        return result

    walk(build(), outputs, start, 3, step=step)
    torch.testing.assert_close(remembered["older"], remembered["newest"])
    assert float(remembered["older"].abs().max()) <= 2.0  # predictions are clipped to ±1


@pytest.mark.parametrize("shape", ((1, 3, 2, 5), (2, 3, 2, 4), (3, 2, 4)))
def test_a_shift_of_another_shape_is_refused(shape: tuple[int, ...]):
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    arguments = {"model_output": torch.zeros(SHAPE), "timestep": scheduler.timesteps[0], "sample": torch.zeros(SHAPE)}
    with pytest.raises(ArgumentError, match=r"shift: shape .* the sample has \(1, 3, 2, 4\)"):
        moved_step(scheduler.step, scheduler, arguments, torch.zeros(shape))
