"""The session: what it says when nothing was guided, loops of one's own, several methods, and old names."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import SkipLayerGuidance  # noqa: E402
from diffusers.hooks import LayerSkipConfig  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import Guidance, Together  # noqa: E402
from tests.offline_pipelines import PROMPT, animatediff, run, wan  # noqa: E402
from tests.pipelines import PIPELINES  # noqa: E402
from tests.pipelines import run as run_case  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["cat", "dog"]


@dataclass(frozen=True)
class Push(Guidance):
    """Moves the latents by a number."""

    amount: float = 0.25

    def before_step(self, call, run):
        run.history.append((call.index, self.amount, call.latents.clone()))
        return call.latents + self.amount


@dataclass(frozen=True)
class Look(Guidance):
    """Leaves every step alone."""

    def before_step(self, call, run):
        return None


def test_a_method_that_guided_no_step_says_so():
    pipe, options = animatediff()
    with pytest.warns(cvg.GuidanceWarning, match="Look did nothing: no denoising step was guided"):  # noqa: SIM117
        with Look().attach(pipe) as made:
            run(pipe, options)
    assert (made.calls, made.guided_steps) == (1, 0)
    with pytest.warns(cvg.GuidanceWarning, match="AnimateDiffPipeline was not called"):  # noqa: SIM117
        with Push().attach(pipe):
            pass
    with pytest.warns(cvg.GuidanceWarning, match="capture recorded nothing: .* was not called"):  # noqa: SIM117
        with cvg.capture(pipe, WORDS):
            pass
    with pytest.warns(cvg.GuidanceWarning, match=r"the run made none of the steps \[7\]"):  # noqa: SIM117
        with cvg.capture(pipe, WORDS, steps=[7]):
            run(pipe, options)


@pytest.mark.parametrize(
    "method",
    [
        Push(stop=0.0),
        cvg.Vico(WORDS, iterations=0),
        cvg.Gen1(1.0),
        cvg.VSTAR(sigma=None),
        cvg.TemporalBand(iterations=0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_settings_that_ask_for_nothing_are_taken_at_their_word(method):
    pipe, options = animatediff()
    stock = run(pipe, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", cvg.GuidanceWarning)
        with method.attach(pipe):
            assert torch.equal(run(pipe, options), stock)


def test_methods_move_in_turn_together_or_one_within_the_other():
    pipe, options = animatediff()
    with Together((Push(0.25), Push(-0.5))).attach(pipe) as made:
        together = run(pipe, options)
    assert made.guided_steps == 3
    (_, _, first), (_, _, second) = made.history[:2]
    torch.testing.assert_close(second, first + 0.25)
    with Push(0.25).attach(pipe) as outer, Push(-0.5).attach(pipe) as inner:
        nested = run(pipe, options)
    torch.testing.assert_close(nested, together)
    torch.testing.assert_close(inner.history[0][2], outer.history[0][2] + 0.25)
    assert cvg.Together is Together


@torch.no_grad()
def own_sampling(pipe, options):
    """AnimateDiff's loop without classifier-free guidance, written out."""
    text, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    text = text.repeat_interleave(options["num_frames"], 0)
    latents = torch.randn(1, 4, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(3)
    for timestep in pipe.scheduler.timesteps:
        given = pipe.scheduler.scale_model_input(latents, timestep)
        prediction = pipe.unet(given, timestep, encoder_hidden_states=text).sample
        latents = pipe.scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def test_a_loop_of_ones_own():
    """Capture and guidance see in it what they see in the pipeline's."""
    pipe, options = animatediff()
    vico = cvg.Vico(WORDS, stop=0.5, iterations=1)
    start = torch.randn(1, 4, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    usual = {"latents": start, "guidance_scale": 1.0, "output_type": "latent"}
    with vico.attach(pipe) as wanted, cvg.capture(pipe, WORDS) as seen:
        by_pipeline = run(pipe, options, **usual)
    with vico.attach(pipe, own_loop=True) as made, cvg.capture(pipe, WORDS) as captured:
        by_hand = own_sampling(pipe, options)
    torch.testing.assert_close(by_hand, by_pipeline)
    assert made.guided == wanted.guided == [(0, 0), (0, 1)]
    assert len(captured.records) == len(seen.records)
    torch.testing.assert_close(captured.heat_map("cat"), seen.heat_map("cat"))
    plain = own_sampling(pipe, options)
    assert not torch.equal(plain, by_hand)
    with cvg.capture(pipe, WORDS, own_loop=True) as alone:
        torch.testing.assert_close(own_sampling(pipe, options), plain, rtol=1e-4, atol=1e-4)
    assert {record.step for record in alone.records} == {0, 1, 2}


def test_a_pipeline_that_steps_elsewhere_is_not_moved_in_silence(monkeypatch):
    """As diffusion forcing does, which steps with copies of its scheduler."""
    pipe, options = wan()
    with cvg.capture(pipe, WORDS) as captured:
        run(pipe, options)
    steps = [record.step for record in captured.records]

    def set_timesteps(*args, stock=pipe.scheduler.set_timesteps, **kwargs):
        stock(*args, **kwargs)
        pipe.scheduler.step = copy.deepcopy(pipe.scheduler).step  # the copy steps from now on

    pipe.scheduler.set_timesteps = set_timesteps
    with cvg.capture(pipe, WORDS) as captured:
        run(pipe, options)
    assert [record.step for record in captured.records] == steps
    del pipe.scheduler.step
    with (
        pytest.raises(cvg.ArgumentError, match="does not step with the `step` of its own sched"),
        Push().attach(pipe),
    ):
        run(pipe, options)


def test_a_guider_that_leaves_layers_out():
    """Skip-layer guidance of modular pipelines: our processors are known to it, and its third call is told apart."""
    pipe, options = PIPELINES["wan_modular"].build()
    left_out = [LayerSkipConfig(indices=[0], fqn="blocks")]
    pipe.update_components(
        guider=SkipLayerGuidance(
            skip_layer_config=left_out, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
        )
    )
    stock = run_case(pipe, options)
    with cvg.capture(pipe, WORDS) as captured, Push(0.0).attach(pipe) as made:
        torch.testing.assert_close(run_case(pipe, options), stock, rtol=1e-4, atol=1e-4)
    assert made.guided_steps == 3
    counts = Counter((record.step, record.branch) for record in captured.records)
    # Two layers a call; the guider leaves the first step alone, and one layer of its own call.
    assert counts == {(step, branch): 2 for step in range(3) for branch in ("cond", "uncond")} | {
        (1, "perturbed"): 1,
        (2, "perturbed"): 1,
    }


@pytest.mark.parametrize("method", [cvg.Vico, cvg.VSTAR, cvg.Gen1, cvg.TemporalBand])
def test_until_is_the_old_name_of_stop(method):
    with pytest.warns(FutureWarning, match=rf"until is called stop now: {method.__name__}\(stop="):
        old = method(until=0.4)
    assert old == method(stop=0.4)


def test_steps_is_the_old_form_of_stop():
    with pytest.warns(FutureWarning, match=r"CVG\(stop=0.1\) guides two"):
        old = cvg.CVG(steps=3)

    class At:
        def __init__(self, index):
            self.index, self.count = index, 100

    assert [old.guides(At(index)) for index in (0, 2, 3)] == [True, True, False]
    assert [cvg.CVG().guides(At(index)) for index in (0, 9, 10)] == [True, True, False]


@pytest.mark.parametrize(("start", "stop", "count", "steps"), [
    (0.0, 0.1, 30, [0, 1, 2]),  # 0.1 · 30 is a hair more than 3
    (0.0, 0.15, 20, [0, 1, 2]),
    (0.5, 1.0, 3, [2]),
    (0.3, 0.3, 10, []),
    (0.0, 0.01, 4, [0]),
])  # fmt: skip
def test_shares_of_steps_are_rounded_up(start, stop, count, steps):
    class At:
        def __init__(self, index):
            self.index, self.count = index, count

    method = Push(start=start, stop=stop)
    assert [index for index in range(count) if method.guides(At(index))] == steps


def test_what_is_no_pipeline_is_refused():
    pipe, _ = animatediff()
    with pytest.raises(cvg.ArgumentError, match="with a scheduler, got UNetMotionModel"):
        Push().attach(pipe.unet)
    with pytest.raises(cvg.ArgumentError, match="pipe must be a diffusers pipeline"):
        cvg.capture(pipe.unet, WORDS)
    with pytest.raises(cvg.ArgumentError, match="methods must hold at least one"):
        cvg.PipelineSession(pipe, ())
