"""The session: what it says when nothing was guided, loops of one's own, several methods, and old names."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import AnimateDiffPipeline, DDIMScheduler, SkipLayerGuidance  # noqa: E402
from diffusers.hooks import LayerSkipConfig  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import Guidance, Together  # noqa: E402
from tests.offline_pipelines import PROMPT, animatediff, run, wan  # noqa: E402
from tests.pipelines import PIPELINES, in_float64  # noqa: E402
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


@pytest.mark.drawn(8, of="long tests")
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


def test_latents_in_float64_stay_so():
    """A move that float32 has no digits for arrives."""
    pipe, options = in_float64(animatediff())
    options["output_type"] = "latent"
    stock = run(pipe, options)
    with Push(1e-11, stop=0.1).attach(pipe) as made:
        moved = run(pipe, options)
    assert [seen.dtype for _, _, seen in made.history] == [torch.float64]
    assert moved.dtype == torch.float64 and 1e-13 < (moved - stock).abs().max() < 1e-9


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
    with pytest.raises(cvg.ArgumentError, match="does not step with the `step` of its own sched"), Push().attach(pipe):
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


@pytest.mark.parametrize(
    ("start", "stop", "count", "steps"),
    [
        (0.0, 0.1, 30, [0, 1, 2]),  # 0.1 · 30 is a hair more than 3
        (0.0, 0.15, 20, [0, 1, 2]),
        (0.5, 1.0, 3, [2]),
        (0.3, 0.3, 10, []),
        (0.0, 0.01, 4, [0]),
    ],
)
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
    with pytest.raises(cvg.ArgumentError, match="methods must be a list of at least one method"):
        cvg.PipelineSession(pipe, ())


def test_a_scheduler_of_ones_own():
    """One that keeps nothing is moved like its base; one that averages with its last sample is refused when it
    matters.
    """

    class Still(DDIMScheduler):
        def step(self, model_output, timestep, sample, **options):
            return super().step(model_output, timestep, sample, **options)

    class Averaging(DDIMScheduler):
        last = None

        def step(self, model_output, timestep, sample, **options):
            sample = sample if self.last is None else (sample + self.last) / 2
            self.last = sample
            return super().step(model_output, timestep, sample, **options)

    class Stacking(Averaging):
        def step(self, model_output, timestep, sample, **options):
            self.kept = [*getattr(self, "kept", []), sample]
            return DDIMScheduler.step(self, model_output, timestep, sum(self.kept), **options)

    class Unnamed(DDIMScheduler):
        def step(self, m, t, x, **options):
            return super().step(m, t, x, **options)

    pipe, options = animatediff()
    config = pipe.scheduler.config
    with Push().attach(pipe):
        wanted = run(pipe, options)
    pipe.scheduler = Still.from_config(config)
    with Push().attach(pipe) as made:
        torch.testing.assert_close(run(pipe, options), wanted)
    assert made.guided_steps == 3
    pipe.scheduler = Unnamed.from_config(config)
    with pytest.raises(cvg.ArgumentError, match="Unnamed: .* must name model_output"), Push().attach(pipe):
        run(pipe, options)
    for kind, name in ((Averaging, "last"), (Stacking, "kept")):
        pipe.scheduler = kind.from_config(config)
        with Push(stop=0.3).attach(pipe) as made:  # before there is anything to remember
            run(pipe, options)
        assert made.guided_steps == 1
        pipe.scheduler = kind.from_config(config)
        message = f"{kind.__name__}: latents cannot be moved: its own `step` keeps {name}"
        with pytest.raises(cvg.ArgumentError, match=message), Push(start=0.3).attach(pipe):
            run(pipe, options)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda z: z[:, :, :1], r"must return latents \(1, 4, 4, 5, 7\), got \(1, 4, 1, 5, 7\)"),
        (lambda z: z + 0j, "must return real latents .* got torch.complex64"),
        (lambda z: z.tolist(), "must return real latents .* got list"),
        (lambda z: z * torch.nan, "must return finite latents, got infinite ones or NaN at step 0"),
    ],
)
def test_what_a_method_returns_is_checked(returned, message):
    @dataclass(frozen=True)
    class Wrong(Guidance):
        def before_step(self, call, run):
            return returned(call.latents)

    pipe, options = animatediff()
    with pytest.raises(cvg.ArgumentError, match=f"Wrong.before_step {message}"), Wrong().attach(pipe):
        run(pipe, options)


def test_a_loss_that_is_not_finite_is_told():
    pipe, options = animatediff()
    with (
        pytest.raises(cvg.ArgumentError, match="the loss of step 0 is infinite or NaN"),
        cvg.Vico(WORDS, step_size=1e30).attach(pipe),
    ):
        run(pipe, options)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda output: output[0], "must return what it is given, a tuple.*got Tensor"),
        (lambda output: (output[0][:, :, :1],), r"must return a prediction \(2, 4, 4, 5, 7\), got"),
        (lambda output: (output[0] / 0,), "must return a finite prediction, got .* at step 0"),
    ],
)
def test_what_a_method_makes_of_a_prediction_is_checked(returned, message):
    @dataclass(frozen=True)
    class Wrong(Guidance):
        def after_prediction(self, call, output):
            return returned(output)

    pipe, options = animatediff()
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: tuple(forward(*args, **kwargs).values())
    with pytest.raises(cvg.ArgumentError, match=f"Wrong.after_prediction {message}"), Wrong().attach(pipe):
        run(pipe, options)


def test_a_denoiser_in_two_threads_is_refused_by_name():
    """The attached run goes on as it would alone."""
    pipe, options = animatediff()
    other = AnimateDiffPipeline(**{**pipe.components, "scheduler": DDIMScheduler()})
    other.set_progress_bar_config(disable=True)
    with Push().attach(pipe):
        alone = run(pipe, options)
    failed = []

    def meanwhile(*_):
        def run_other():
            try:
                run(other, options)
            except cvg.ArgumentError as error:
                failed.append(str(error))

        thread = threading.Thread(target=run_other)
        thread.start()
        thread.join()
        return {}

    with Push().attach(pipe) as made:
        both = run(pipe, options, callback_on_step_end=meanwhile)
    assert torch.equal(both, alone) and made.guided_steps == 3
    assert len(failed) == 3 and "UNetMotionModel is called from another thread while" in failed[0]
    assert run(other, options).isfinite().all()


def test_reasons_why_nothing_was_guided():
    pipe, options = animatediff()

    def told(method, prompt=PROMPT):
        with pytest.warns(cvg.GuidanceWarning) as caught, method.attach(pipe) as made:
            run(pipe, options, prompt)
        assert made.guided_steps == 0
        return str(caught[-1].message)

    assert "sigma names the widths [32, 64], the layers' grids have [4, 7]" in told(
        cvg.VSTAR(sigma={64: 1.0, 32: 8.0})
    )
    assert "one state only, the prompt itself" in told(cvg.VSTAR(sigma=None, prompts="then"))
    with pytest.warns(cvg.GuidanceWarning, match="the gradient of its loss was zero"):  # noqa: SIM117
        with cvg.Vico(["cat"], iterations=1).attach(pipe):
            run(pipe, options, "cat")
    with pytest.warns(cvg.GuidanceWarning, match="prompt='a dog' is for calls with prompt_embeds"):  # noqa: SIM117
        with Push().attach(pipe, prompt="a dog"):
            run(pipe, options)


def test_squeezed_positions_count_as_guided():
    pipe, options = animatediff()
    with cvg.VSTAR(sigma=None, trained_frames=2).attach(pipe) as made:
        run(pipe, options)
    assert made.guided_steps == 3


def test_one_of_two_names_for_a_setting():
    with pytest.raises(cvg.ArgumentError, match="until is the old name of stop: give one of them"):
        cvg.Vico(until=0.9, stop=0.1)
