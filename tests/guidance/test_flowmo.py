"""FlowMo on tiny pipelines: its formula, the clean latents that a prediction stands for, its gradient, its errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import Guidance, motion_variance  # noqa: E402
from cvg_kernels.pipeline.clean import check_clean, clean_latents, prediction_of  # noqa: E402
from tests.differences import assert_gradient  # noqa: E402
from tests.offline_pipelines import BUILDERS, animatediff, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = list(BUILDERS)


def test_the_loss_by_its_formula():
    """As the released code computes it, step by step, on one video `[C, F, H, W]`."""
    video = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64)
    wanted = []
    for each in video:
        frames = each.permute(1, 2, 3, 0)
        variance = torch.var(torch.diff(frames, dim=0).abs(), dim=0, unbiased=False).mean(-1)
        wanted.append([variance.max(), variance.mean()])
    found = torch.stack([motion_variance(video), motion_variance(video, "mean")], 1)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_even_motion_has_no_variance():
    steady = torch.arange(6.0)[None, None, :, None, None] * torch.randn(1, 2, 1, 3, 3)
    assert float(motion_variance(steady)) < 1e-10
    jump = steady.clone()
    jump[:, :, 3:, 1, 2] += 5
    assert float(motion_variance(jump)) > 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_clean_latents_are_the_schedulers(name, kind):
    """Where a scheduler says what clean sample it has in mind, it is this;
    Euler keeps latents in a scale of its own.
    """
    bare = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(prediction_type=kind, **bare)
    check_clean(scheduler)
    scheduler.set_timesteps(5)
    timestep = scheduler.timesteps[1]
    z, prediction = torch.randn(2, 1, 4, 5, 3, 3, dtype=torch.float64)
    scale = 1.0
    if "Euler" in name:
        scheduler.scale_model_input(z, timestep)
        scale = float((scheduler.sigmas[1].double() ** 2 + 1) ** -0.5)
    wanted = scheduler.step(prediction, timestep, z).pred_original_sample
    call = SimpleNamespace(pipe=SimpleNamespace(scheduler=scheduler), timestep=float(timestep), scale=scale)
    found = clean_latents(call, z, prediction)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=["euler", "unipc"],
)
def test_clean_latents_of_a_flow(scheduler):
    """z = (1 − σ) x + σ ε and p = ε − x give x."""
    check_clean(scheduler)
    scheduler.set_timesteps(5)
    timestep, sigma = float(scheduler.timesteps[2]), float(scheduler.sigmas[2])
    x, noise = torch.randn(2, 1, 4, 5, 3, 3, dtype=torch.float64)
    call = SimpleNamespace(pipe=SimpleNamespace(scheduler=scheduler), timestep=timestep, scale=1.0)
    found = clean_latents(call, (1 - sigma) * x + sigma * noise, noise - x)
    assert (found - x).abs().max() < 2e-3 * (noise - x).abs().max()  # UniPC rounds its timesteps


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name):
    pipe, options = BUILDERS[name]()
    with cvg.FlowMo(iterations=6, step_size=0.003, stop=0.3).attach(pipe) as made:
        run(pipe, options)
    losses = [float(entry["loss"]) for entry in made.history]
    assert len(losses) == 6 and losses[-1] < losses[0]


@pytest.mark.parametrize("of", ["clean", "prediction"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.drawn(3)
def test_the_gradient_is_that_of_finite_differences(name, of):
    pipe, options = BUILDERS[name]()
    pipe.to(dtype=torch.float64)
    checked = []

    class Probe(Guidance):
        def before_step(self, call, made):
            def loss(z):
                prediction = prediction_of(call, call.denoise(z)).double()
                if of == "clean":
                    prediction = clean_latents(call, z, prediction)
                return motion_variance(prediction, "mean").sum()

            if not checked:
                z = call.latents.double().requires_grad_()
                assert_gradient(loss, z, torch.autograd.grad(loss(z), z)[0])
                checked.append(call.index)

    with pytest.warns(cvg.GuidanceWarning, match="Probe did nothing"), Probe(stop=0.3).attach(pipe):
        run(pipe, options)
    assert checked == [0]


def test_what_cannot_be_guided_is_named():
    pipe, options = animatediff()
    with pytest.raises(cvg.ArgumentError, match="of must be one of 'clean', 'prediction'"):
        cvg.FlowMo(of="noise")
    with pytest.raises(cvg.ArgumentError, match="three at least: the latents have 2"), cvg.FlowMo().attach(pipe):
        run(pipe, {**options, "num_frames": 2})
    with pytest.raises(cvg.ArgumentError, match="give of='prediction'"):
        check_clean(SimpleNamespace(config={"prediction_type": "score"}))


def test_a_step_of_zero_changes_nothing():
    pipe, options = animatediff()
    stock = run(pipe, options)
    with cvg.FlowMo.released(step_size=0.0).attach(pipe) as made:
        assert torch.equal(run(pipe, options), stock)
    assert made.history
