"""Which entries of a schedule lead their step, and which schedulers are known, refused or taken as they look."""

from __future__ import annotations

import pytest
import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.schedulers import KINDS, REFUSED, Place, check_scheduler, moved_step, places_of

diffusers = pytest.importorskip("diffusers")

from .scheduler_rules import walk  # noqa: E402

TWICE = [Place(0, True)] + [place for step in range(1, 4) for place in (Place(step - 1, False), Place(step, True))]
"""Four steps of two calls, the last of one."""


@pytest.mark.parametrize(
    "name",
    (
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DPMSolverSDEScheduler",
    ),
)
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
    assert places_of(plms) == [Place(0, True), Place(0, False), Place(1, True), Place(2, True), Place(3, True)]
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
    assert [place.leading for place in places_of(third)] == [True, False, False, True, False, False, True]
    # Cut in the middle of a step, the first call has nothing to look back at.
    assert [place.leading for place in places_of(third, 1)] == [True, False, True, False, False, True]


@pytest.mark.parametrize(
    "name", ("DDIMScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "LCMScheduler")
)
def test_places_of_one_call_a_step(name: str):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(5)
    assert places_of(scheduler) == [Place(step, True) for step in range(5)]
    assert scheduler.__dict__.get("_step_index") is None


def test_every_scheduler_of_diffusers_is_known():
    structure = diffusers.schedulers._import_structure
    exported = {name for names in structure.values() for name in names if name.endswith("Scheduler")}
    named = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    for missing in ("scipy", "torchsde"):  # dummies stand for classes that need them
        dummies = getattr(diffusers.utils, f"dummy_torch_and_{missing}_objects", None)
        named |= {name for name in dir(dummies) if name.endswith("Scheduler")}
    assert exported | named == set(KINDS) | set(REFUSED)
    assert not set(KINDS) & set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusals_name_the_class_and_what_to_use(name: str):
    scheduler = type("Mine", (type(name, (), {}),), {"timesteps": [3, 2, 1]})()
    with pytest.raises(ArgumentError, match=f"Mine: latents cannot be moved: {REFUSED[name][:20]}.*use DDIM"):
        check_scheduler(scheduler)
    # Capture only reads: it needs to know which entry is which step.
    assert [place.step for place in places_of(scheduler)] == [0, 1, 2]


class _Plain:
    """A user's scheduler without a memory."""

    def __init__(self):
        self.timesteps = torch.arange(5, 0, -1)

    def step(self, model_output, timestep, sample, return_dict=True):
        return (sample - 0.1 * model_output,)


def test_an_unknown_class_is_taken_as_it_looks():
    plain = _Plain()
    check_scheduler(plain)
    assert places_of(plain) == [Place(step, True) for step in range(5)]
    outputs, (start, shift) = torch.randn(5, 1, 3, 2), torch.randn(2, 1, 3, 2)

    def step(scheduler, arguments):
        return moved_step(scheduler.step, scheduler, arguments, shift)

    moved, without = walk(plain, outputs, start, 2, step=step), walk(plain, outputs, start)
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
