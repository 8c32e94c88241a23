"""A step from moved latents is a step from latents that were moved all along, whatever the scheduler remembers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.schedulers import (
    KINDS,
    REFUSED,
    Kind,
    Place,
    check_scheduler,
    moved_step,
    places_of,
)

diffusers = pytest.importorskip("diffusers")

from .scheduler_cases import GIVEN, MEMORY, STEPS, Case, walk  # noqa: E402

SHAPE = (1, 3, 2, 4)
EPS = torch.finfo(torch.float32).eps
PUSHES = (0, 1, 2, 5, STEPS - 1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Should have:UserWarning"
)  # torchsde at the ends of its schedule


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


def errors(
    got: list, without: list, shift: torch.Tensor, sizes: list[float], ends: list[int]
) -> list[float]:
    """How far the moves that are left after each step are from what they have to be."""
    return [
        float((got[end] - without[end] - size * shift).abs().max())
        for end, size in zip(ends, sizes, strict=True)
    ]


@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("case", MEMORY + GIVEN, ids=str)
def test_a_move_goes_on_as_the_equation_says(case: Case, push: int):
    scheduler = case.build()
    places = places_of(scheduler)[: case.entries(scheduler)]
    outputs, start, shift = tensors(len(places))
    step, entry, ends = runs(places, push)
    sizes = case.expected(scheduler, step)
    without = walk(scheduler, outputs, start)

    moved = walk(case.build(), outputs, start, entry, step=moving(shift))
    # The schedulers' coefficients are float32. What that makes of a move before the first step, when there is nothing to
    # remember, is the stock scheduler's own error; roundings of the latents and of the predictions they lead to come on top.
    stock = walk(case.build(), outputs, start, 0, shift)
    first = case.expected(scheduler, 0)
    stock_ends = runs(places, 0)[2]
    reach = len(first) if case.lasting else 1
    own = max(errors(stock, without, shift, first, stock_ends)[:reach])
    largest = max(
        abs(case.prediction(alpha, sigma)) for alpha, sigma in case.levels(scheduler)[:-1]
    )
    size = max(float(latents.abs().max()) for latents in [start, *without, *moved])
    size = max(size, largest * float(shift.abs().max()))
    reach = len(sizes) if case.lasting else 1
    found = errors(moved, without, shift, sizes, ends)[:reach]
    assert max(found) <= 4 * own + 64 * EPS * size, found
    assert all(torch.equal(a, b) for a, b in zip(without[:entry], moved[:entry], strict=True))


@pytest.mark.parametrize("push", (1, 6, 15))
@pytest.mark.parametrize(
    "name",
    (
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DEISMultistepScheduler",
        "IPNDMScheduler",
    ),
)
def test_a_move_under_v_prediction_stays_as_it_is_to_the_end(name: str, push: int):
    # In variance-preserving latents x = cos φ x₀ + sin φ ε with v = dx/dφ: with v fixed a move stays the same. A solver
    # of first order keeps cos Δφ of it in each step, that is, loses Δφ²/2; one of higher order is allowed twice that.
    settings = {} if name == "IPNDMScheduler" else {"prediction_type": "v_prediction"}
    case = next(case for case in MEMORY if case.scheduler == name and case.config.get("prediction_type", None)
                == settings.get("prediction_type"))  # fmt: skip
    scheduler = case.build(30)
    outputs, start, shift = tensors(30)
    angles = [math.atan2(sigma, alpha) for alpha, sigma in case.levels(scheduler)]
    allowed = sum((a - b) ** 2 for a, b in zip(angles[push:-1], angles[push + 1 :], strict=True))
    without = walk(scheduler, outputs, start)
    moved = walk(case.build(30), outputs, start, push, step=moving(shift))
    assert max(
        errors(moved, without, shift, [1.0] * (30 - push), list(range(push, 30)))
    ) <= allowed * float(shift.abs().max())


@pytest.mark.parametrize("push", PUSHES)
@pytest.mark.parametrize("case", MEMORY + GIVEN, ids=str)
def test_no_move_gives_the_stock_run(case: Case, push: int):
    scheduler = case.build()
    places = places_of(scheduler)[: case.entries(scheduler)]
    outputs, start, shift = tensors(len(places))
    stock = walk(scheduler, outputs, start)
    entry = runs(places, push)[1]
    moved = walk(case.build(), outputs, start, entry, step=moving(torch.zeros_like(shift)))
    for without, latents in zip(stock, moved, strict=True):
        torch.testing.assert_close(latents, without, rtol=0, atol=0)


@pytest.mark.parametrize("case", MEMORY + GIVEN, ids=str)
def test_a_step_leaves_nothing_behind_even_if_it_raises(case: Case):
    scheduler = case.build()
    places = places_of(scheduler)[: case.entries(scheduler)]
    outputs, start, shift = tensors(len(places))
    _, entry, _ = runs(places, 2)
    state = {}

    def attributes(scheduler) -> dict:
        return {key: copy.copy(value) for key, value in vars(scheduler).items()}

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


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind is Kind.ONE_CALL])
def test_schedulers_without_a_memory_step_from_the_moved_sample(name: str):
    if name in ("HeliosDMDScheduler", "PiflowScheduler"):
        pytest.skip("its step takes what only its own pipeline has")
    case = Case(name, {}, None, None)
    outputs, start, shift = (tensor.float() for tensor in tensors(case.entries(case.build())))
    moved = walk(case.build(), outputs, start, 3, step=moving(shift))
    stock = walk(case.build(), outputs, start, 3, shift)
    assert not torch.equal(moved[3], walk(case.build(), outputs, start)[3])
    assert all(torch.equal(a, b) for a, b in zip(moved, stock, strict=True))


TWICE = [Place(0, True)] + [
    place for step in range(1, 4) for place in (Place(step - 1, False), Place(step, True))
]
"""Four steps of two calls, the last of one."""


@pytest.mark.parametrize(
    "name",
    ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
     "FlowMatchHeunDiscreteScheduler", "DPMSolverSDEScheduler"),
)  # fmt: skip
def test_places_of_two_call_steps(name: str):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(4)
    assert places_of(scheduler) == TWICE
    # Video-to-video cuts whole steps.
    assert places_of(scheduler, 2 * scheduler.order) == TWICE[: 7 - 4]


def test_places_of_pndm():
    plms = diffusers.PNDMScheduler(skip_prk_steps=True)
    plms.set_timesteps(4)
    assert places_of(plms) == [
        Place(0, True),
        Place(0, False),
        Place(1, True),
        Place(2, True),
        Place(3, True),
    ]
    # A cut run repeats its own first call.
    assert places_of(plms, 2) == [Place(0, True), Place(0, False), Place(1, True)]
    runge_kutta = diffusers.PNDMScheduler(skip_prk_steps=False)
    runge_kutta.set_timesteps(5)
    four = [Place(step, call == 0) for step in range(3) for call in range(4)]
    assert places_of(runge_kutta) == [*four, Place(3, True), Place(4, True)]


def test_places_of_singlestep_solvers():
    third = diffusers.DPMSolverSinglestepScheduler(solver_order=3, lower_order_final=True)
    third.set_timesteps(7)
    assert [place.step for place in places_of(third)] == [0, 0, 0, 1, 1, 1, 2]
    assert [place.leading for place in places_of(third)] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    # Cut in the middle of a step, the first call has nothing to look back at.
    assert [place.leading for place in places_of(third, 1)] == [
        True,
        False,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "name",
    ("DDIMScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "LCMScheduler"),
)
def test_places_of_one_call_a_step(name: str):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(5)
    assert places_of(scheduler) == [Place(step, True) for step in range(5)]
    assert scheduler.__dict__.get("_step_index") is None


LEADERS = [
    case
    for case in GIVEN
    if KINDS[case.scheduler] in (Kind.CALLS, Kind.PNDM, Kind.SINGLESTEP)
    and case.config.get("prediction_type", "epsilon") in ("epsilon", "flow_prediction")
]


@pytest.mark.parametrize("case", LEADERS, ids=str)
def test_the_stock_scheduler_loses_a_move_just_where_an_entry_does_not_lead(case: Case):
    scheduler = case.build()
    places = places_of(scheduler)
    outputs, start, shift = tensors(len(places))
    without = walk(scheduler, outputs, start)
    for entry, place in enumerate(places):
        seen = walk(case.build(), outputs, start, entry, shift)
        end = max(at for at, other in enumerate(places) if other.step == place.step)
        left = float((seen[end] - without[end]).norm() / shift.norm())
        assert (left > 0.5) == place.leading, (entry, left)
        if not place.leading:
            with pytest.raises(ArgumentError, match="lose the move"):
                walk(case.build(), outputs, start, entry, step=moving(shift))


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
            with pytest.raises(ArgumentError, match="lose the move"):
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
    without, alphas = (
        walk(scheduler, outputs, start),
        1 / (1 + scheduler.sigmas.double() ** 2).sqrt(),
    )
    for push in (1, 4):
        check_scheduler(scheduler)
        moved = walk(build(), outputs, start, push, step=moving(shift))
        sizes = (alphas[push + 1 :] / alphas[push]).tolist()
        found = errors(moved, without, shift, sizes, list(range(push, STEPS)))
        size = max(float(latents.abs().max()) for latents in [*without, *moved]) / float(alphas[0])
        assert max(found) <= 64 * EPS * size


def test_a_predictor_of_two_calls_is_refused():
    scheduler = diffusers.UniPCMultistepScheduler(solver_p=diffusers.HeunDiscreteScheduler())
    with pytest.raises(
        ArgumentError, match=r"UniPCMultistepScheduler: solver_p=HeunDiscreteScheduler"
    ):
        check_scheduler(scheduler)


def test_half_precision_and_several_branches_in_one_batch():
    def build():
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        )
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
        scheduler = diffusers.DPMSolverMultistepScheduler(
            thresholding=True, prediction_type="epsilon"
        )
        scheduler.set_timesteps(STEPS)
        return scheduler

    outputs, start, shift = tensors(STEPS)
    remembered = {}

    def step(scheduler, arguments):
        before = list(scheduler.model_outputs)
        plain = scheduler.convert_model_output(
            arguments["model_output"], sample=arguments["sample"]
        )
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
    arguments = {
        "model_output": torch.zeros(SHAPE),
        "timestep": scheduler.timesteps[0],
        "sample": torch.zeros(SHAPE),
    }
    with pytest.raises(ArgumentError, match=r"shift: shape .* the sample has \(1, 3, 2, 4\)"):
        moved_step(scheduler.step, scheduler, arguments, torch.zeros(shape))


def test_every_scheduler_of_diffusers_is_known():
    structure = diffusers.schedulers._import_structure
    exported = {
        name for names in structure.values() for name in names if name.endswith("Scheduler")
    }
    named = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    for missing in ("scipy", "torchsde"):  # dummies stand for classes that need them
        dummies = getattr(diffusers.utils, f"dummy_torch_and_{missing}_objects", None)
        named |= {name for name in dir(dummies) if name.endswith("Scheduler")}
    assert exported | named == set(KINDS) | set(REFUSED)
    assert not set(KINDS) & set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusals_name_the_class_and_what_to_use(name: str):
    scheduler = type("Mine", (type(name, (), {}),), {"timesteps": [3, 2, 1]})()
    with pytest.raises(
        ArgumentError, match=f"Mine: latents cannot be moved: {REFUSED[name][:20]}.*use DDIM"
    ):
        check_scheduler(scheduler)
    # Capture only reads: it needs to know which entry is which step.
    assert [place.step for place in places_of(scheduler)] == [0, 1, 2]


class _Plain:
    """A user's scheduler without a memory."""

    def __init__(self):
        self.timesteps = torch.arange(5, 0, -1)

    def step(self, model_output, timestep, sample):
        return (sample - 0.1 * model_output,)


def test_an_unknown_class_is_taken_as_it_looks():
    plain = _Plain()
    check_scheduler(plain)
    assert places_of(plain) == [Place(step, True) for step in range(5)]
    outputs, start, shift = tensors(5)
    moved, without = walk(plain, outputs, start, 2, step=moving(shift)), walk(plain, outputs, start)
    torch.testing.assert_close(moved[-1], without[-1] + shift)
    plain.model_outputs = [None, None]
    with pytest.raises(ArgumentError, match=r"_Plain.*unknown.*model_outputs"):
        check_scheduler(plain)
    del plain.model_outputs
    plain.order = 2
    with pytest.raises(ArgumentError, match=r"_Plain.*order=2"):
        check_scheduler(plain)


def test_subclasses_count_as_their_base():
    mine = type("Mine", (diffusers.HeunDiscreteScheduler,), {})()
    mine.set_timesteps(4)
    check_scheduler(mine)
    assert places_of(mine) == TWICE


@pytest.mark.parametrize("start", (-1, 5))
def test_a_start_outside_the_schedule_is_refused(start: int):
    with pytest.raises(ArgumentError, match=f"start={start}: _Plain has 5 timesteps"):
        places_of(_Plain(), start)


def test_a_scheduler_without_a_schedule_is_refused():
    with pytest.raises(ArgumentError, match="no timesteps"):
        places_of(diffusers.LTXEulerAncestralRFScheduler())
