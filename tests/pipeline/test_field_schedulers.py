"""Every scheduler that AnimateDiff and Wan pipelines run with: a move of the latents arrives, at every step."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402
import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.field import Push, last_latents, pattern  # noqa: E402
from tests.pipelines import PIPELINES, denoisers, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 5
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

#: Those that step in the space x₀ + σε, where a move is carried along as it is.
VARIANCE_EXPLODING = {
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
}
#: Those that step in the space αx₀ + σε, where it goes on as α does.
VARIANCE_PRESERVING = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "SASolverScheduler": {},
}
#: For predictions of a flow (1 − σ)x₀ + σε: a move is carried along as it is.
FLOWS = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "UniPCMultistepScheduler": _FLOW,
    "DPMSolverMultistepScheduler": _FLOW,
    "DPMSolverSinglestepScheduler": _FLOW,
    "DEISMultistepScheduler": _FLOW,
}
CASES = [
    *(("animatediff", name, settings) for name, settings in VARIANCE_EXPLODING.items()),
    *(("animatediff", name, settings) for name, settings in VARIANCE_PRESERVING.items()),
    *(("wan", name, settings) for name, settings in FLOWS.items()),
]
#: Those that mix the given latents into the prediction, or noise into the result: no factor of their own.
MIXED = [
    ("animatediff", "EDMEulerScheduler", {"prediction_type": "epsilon"}),
    ("wan", "SASolverScheduler", _FLOW),
    ("wan", "FlowMatchLCMScheduler", {}),
]


def ids(case):
    return "-".join(case[:2])


def build(name, kind, settings):
    if kind == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    pipe, options = PIPELINES[name].build()
    scheduler = getattr(diffusers, kind)
    if "clip_sample" in inspect.signature(scheduler.__init__).parameters:
        settings = {"clip_sample": False, **settings}  # clipped, a move is no move
    pipe.scheduler = scheduler(**settings)
    return pipe, options


@pytest.mark.parametrize("case", [*CASES, *MIXED], ids=ids)
@pytest.mark.drawn(9)
def test_a_move_at_the_first_step_is_one_of_the_noise_that_is_begun_with(case):
    """Exactly so, for every scheduler and the real network: there is nothing yet that a scheduler could remember."""
    name, *_ = case
    pipe, options = build(*case)
    start = torch.randn(1, 4 if name == "animatediff" else 16, *PIPELINES[name].latents)
    pipe.scheduler.set_timesteps(STEPS)
    unit = float(getattr(pipe.scheduler, "init_noise_sigma", 1.0))
    by = 0.5 * unit
    moved = start + 0.5 * pattern(start.shape)
    want = last_latents(pipe, options, latents=moved.clone(), num_inference_steps=STEPS)
    with Push(by=by, stop=1 / STEPS).attach(pipe) as made:
        got = last_latents(pipe, options, latents=start.clone(), num_inference_steps=STEPS)
    assert made.guided == [(0, 0)]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.drawn(8)
def test_a_move_at_every_step_reaches_the_end(case):
    """With a network that predicts the same whatever it is given, the scheduler carries a move along by a known
    factor.
    """
    name, kind, _ = case
    pipe, options = build(*case)
    network = denoisers(pipe)[0]

    def fixed(module, args, output):
        same = 0.1 * pattern(output[0].shape)
        return (same,) if isinstance(output, tuple) else type(output)(same)

    hook = network.register_forward_hook(fixed)
    try:
        stock = last_latents(pipe, options, num_inference_steps=STEPS)
        with Push().attach(pipe) as made:
            got = last_latents(pipe, options, num_inference_steps=STEPS)
    finally:
        hook.remove()
    count = 3 if "Singlestep" in kind else STEPS  # its calls come in pairs
    assert [(entry["step"], entry["count"]) for entry in made.history] == [(at, count) for at in range(count)]
    assert made.guided == [(0, at) for at in range(count)]
    push = 0.5 * pattern(got.shape)
    if kind in VARIANCE_PRESERVING and name == "animatediff":
        alphas = pipe.scheduler.alphas_cumprod.sqrt()
        factors = [1 / float(alphas[int(entry["timestep"])]) for entry in made.history]
    else:
        factors = [1.0] * count
    last = (got - stock).flatten() @ push.flatten() / push.flatten().square().sum()
    torch.testing.assert_close(got - stock, last * push, rtol=1e-3, atol=1e-3 * float(last * push.abs().max()))
    end = float(last) / sum(factors)
    assert end == pytest.approx(1.0, rel=0.02)  # α of the end


def test_pndms_first_steps_are_of_four_calls():
    """Runge-Kutta steps: the latents can be moved at the first call of each."""
    pipe, options = build("animatediff", "PNDMScheduler", {"skip_prk_steps": False})
    with Push().attach(pipe) as made, cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, options, num_inference_steps=STEPS)
    steps = [entry["step"] for entry in made.history]
    assert steps == sorted(set(steps)) and steps[0] == 0
    assert {record.step for record in captured.records} == set(steps)


@pytest.mark.parametrize("kind", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_both_calls_of_a_two_call_step_are_one_step(kind):
    pipe, options = build("animatediff", kind, {})
    with Push(stop=0.5).attach(pipe) as made, cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, options, num_inference_steps=4)
    assert made.guided == [(0, 0), (0, 1)]
    layer = captured.records[0].layer
    calls = [r.step for r in captured.records if r.layer == layer and r.branch == "cond"]
    assert calls == [0, 0, 1, 1, 2, 2, 3]  # the last is of first order


def test_a_scheduler_that_cannot_be_guided_is_refused_before_anything_runs():
    pipe, options = build("animatediff", "DDIMInverseScheduler", {})
    with pytest.raises(cvg.ArgumentError, match="DDIMInverseScheduler"), Push().attach(pipe):
        run(pipe, options)
    with cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, options)
    assert captured.records


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", ["animatediff", "wan"])
def test_schedulers_compared_in_a_loop(name):
    """`pipe.scheduler = …` in the block: each is as if it had been there from the beginning."""
    kinds = VARIANCE_EXPLODING if name == "animatediff" else FLOWS
    kinds = dict(list(kinds.items())[:3])
    apart = {}
    for kind, settings in kinds.items():
        pipe, options = build(name, kind, settings)
        with Push(stop=0.5).attach(pipe) as made:
            apart[kind] = run(pipe, options, num_inference_steps=4), made.guided
    pipe, options = PIPELINES[name].build()
    with Push(stop=0.5).attach(pipe) as made:
        for number, (kind, settings) in enumerate(kinds.items()):
            first = len(made.guided)
            pipe.scheduler = build(name, kind, settings)[0].scheduler
            frames = run(pipe, options, num_inference_steps=4)
            torch.testing.assert_close(frames, apart[kind][0], rtol=0, atol=0)
            assert made.guided[first:] == [(number, step) for _, step in apart[kind][1]]
    assert not [key for key in vars(pipe.scheduler) if "cvg" in key or key == "step"]


def test_a_schedule_of_the_users_own():
    """One that was set before the call, and others in the same block."""
    pipe, options = PIPELINES["animatediff"].build()
    pipe.scheduler.set_timesteps(50)
    with Push(stop=0.5).attach(pipe) as made:
        run(pipe, options)
        run(pipe, {**options, "num_inference_steps": 6})
    assert made.guided == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
