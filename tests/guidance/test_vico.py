"""Vico on tiny pipelines: guided from the first step, right in its gradient, gone afterwards."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import Guidance  # noqa: E402
from cvg_kernels.guidance.flow_graph import flow_groups  # noqa: E402
from cvg_kernels.guidance.losses import fairness_loss  # noqa: E402
from cvg_kernels.guidance.steps import LatentStepper  # noqa: E402
from cvg_kernels.pipeline.layer_capture import LayerCapture  # noqa: E402
from cvg_kernels.pipeline.models import denoisers_of  # noqa: E402
from cvg_kernels.prompts.words import content_words  # noqa: E402
from tests.differences import assert_gradient  # noqa: E402
from tests.guidance.descending import assert_samples_apart  # noqa: E402
from tests.offline_pipelines import BUILDERS, PROMPT, animatediff, noise, run, wan  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = list(BUILDERS)
WORDS = ["cat", "dog"]


def guide(words, **options) -> cvg.Vico:
    """Vico on the first half of the steps, one update each, unless said otherwise."""
    return cvg.Vico(words, **{"stop": 0.5, "iterations": 1, **options})


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_zero_changes_nothing(name):
    pipe, options = BUILDERS[name]()
    stock = run(pipe, options)
    with guide(WORDS, step_size=0.0).attach(pipe) as made:
        guided = run(pipe, options)
    assert torch.equal(guided, stock)
    assert [entry["step"] for entry in made.history] == [0, 1]  # the first half of three steps, rounded up


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name):
    pipe, options = BUILDERS[name]()
    with guide(WORDS, iterations=6, step_size=0.005).attach(pipe) as made:
        run(pipe, options)
    first = [float(entry["loss"]) for entry in made.history if entry["step"] == 0]
    assert len(first) == 6 and first[-1] < first[0]
    assert set(made.history[0]["scores"][0]) == set(WORDS)
    assert made.history[0]["gradient_norm"] > 0


@pytest.mark.parametrize("spatial", [False, True], ids=["", "spatial"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.drawn(8, of="long tests")
def test_the_gradient_is_that_of_finite_differences(name, spatial):
    """Through the whole of it: denoiser, captured layers, flow, scores, loss."""
    if spatial and name in ("wan", "cogvideox"):
        pytest.skip("its attention spans the whole video")
    pipe, options = BUILDERS[name]()
    pipe.to(dtype=torch.float64)
    vico = guide(WORDS, loss="variance", temperature=0.1, sharpness=5.0, spatial=spatial)
    checked = []

    class Probe(Guidance):
        def before_step(self, call, made):
            groups = flow_groups(call.denoiser, vico.flow, vico.spatial)
            table = vico.table(call)
            names = (
                [group.cross for group in groups],
                [t for group in groups for t in group.temporal],
                [group.spatial for group in groups if group.spatial],
            )

            def loss(z):
                maps = capture.run(lambda: call.denoise(z))
                return fairness_loss(vico.scores(maps, groups, table), "variance").sum()

            with LayerCapture(call.denoiser, table.ids, *names) as capture:
                z = call.latents.double().requires_grad_()
                assert_gradient(loss, z, torch.autograd.grad(loss(z), z)[0])
            checked.append(call.index)

    with pytest.warns(cvg.GuidanceWarning, match="Probe did nothing"), Probe().attach(pipe):
        run(pipe, options)
    assert checked == [0, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_is_guided_in_every_place(name):
    """The moved latents reach both branches of the denoiser and the scheduler, at step 0 already."""
    pipe, options = BUILDERS[name]()

    class Shift(Guidance):
        def before_step(self, call, made):
            made.history.append(call)
            return call.latents + 0.25 if call.index == 0 else None

    def trace(attached):
        seen = {"inputs": [], "samples": []}
        denoiser, scheduler = denoisers_of(pipe)[0], pipe.scheduler
        stock, forward = scheduler.step, denoiser.forward

        def spy_step(model_output, timestep, sample, **rest):
            seen["samples"].append(sample.clone())
            return stock(model_output, timestep, sample, **rest)

        @wraps(forward)
        def spy_call(*args, **kwargs):
            name = "sample" if "sample" in kwargs else "hidden_states"
            seen["inputs"].append((args[0] if args else kwargs[name]).clone())
            return forward(*args, **kwargs)

        scheduler.step, denoiser.forward = spy_step, spy_call
        try:
            if attached:
                with Shift().attach(pipe) as made:
                    run(pipe, options)
                assert scheduler.step is spy_step
                assert [call.index for call in made.history] == [0, 1, 2]
                assert made.guided == [(0, 0)] and made.calls == 1
                assert made.history[0].count == 3 and made.history[0].latents.dtype == torch.float32
                assert made.history[0].prompts == [PROMPT]
            else:
                run(pipe, options)
        finally:
            del scheduler.step, denoiser.forward
        return seen

    plain, guided = trace(False), trace(True)
    torch.testing.assert_close(guided["samples"][0], plain["samples"][0] + 0.25)
    calls = 2 if name == "wan" else 1
    for call in range(calls):
        torch.testing.assert_close(guided["inputs"][call], plain["inputs"][call] + 0.25)


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.drawn(8, of="long tests")
def test_schedulers(scheduler):
    """Also one that scales the denoiser's input: a step of zero changes nothing, the loss falls."""
    pipe, options = animatediff()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    stock = run(pipe, options)
    with guide(WORDS, step_size=0.0).attach(pipe):
        torch.testing.assert_close(run(pipe, options), stock, rtol=1e-5, atol=1e-5)
    with guide(WORDS, iterations=5, step_size=0.005).attach(pipe) as made:
        guided = run(pipe, options)
    assert not torch.equal(guided, stock)
    first = [float(entry["loss"]) for entry in made.history if entry["step"] == 0]
    assert first[-1] < first[0]


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_schedulers_of_transformers(name):
    """Wan's, and the one of CogVideoX-5b:
    it has arguments of its own, and draws noise from the pipeline's generator.
    """
    pipe, options = BUILDERS[name]()
    pipe.scheduler = {
        "wan": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "cogvideox": diffusers.CogVideoXDPMScheduler(),
    }[name]
    stock = run(pipe, options)
    with guide(WORDS, step_size=0.0).attach(pipe) as made:
        assert torch.equal(run(pipe, options), stock)
    assert len(made.history) == 2
    with guide(WORDS, step_size=0.01).attach(pipe):
        assert not torch.equal(run(pipe, options), stock)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_see_each_other(name):
    pipe, options = BUILDERS[name]()
    assert_samples_apart(guide(WORDS, iterations=2), pipe, options, noise(name, pipe, 2))


def test_several_videos_of_a_prompt():
    pipe, options = wan()
    with guide(WORDS).attach(pipe) as made:
        frames = run(pipe, options, num_videos_per_prompt=2)
    assert len(frames) == 2 and made.history[0]["loss"].shape == (2,)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_model_has_float32_latents(dtype):
    pipe, options = animatediff()
    pipe.to(dtype=dtype)

    class Look(Guidance):
        def before_step(self, call, made):
            made.history.append(call.latents.dtype)
            return guide(WORDS).before_step(call, cvg.guidance.Run())

    with Look().attach(pipe) as made:
        frames = run(pipe, options)
    assert set(made.history) == {torch.float32} and torch.isfinite(frames).all()


def leftovers(pipe):
    denoiser = denoisers_of(pipe)[0]
    return (
        type(pipe),
        {name for name in vars(pipe) if name.startswith("_cvg")},
        {"encode_prompt"} & set(vars(pipe)),
        type(pipe.scheduler),
        {"step", "scale_model_input"} & set(vars(pipe.scheduler)),
        {name for name in vars(pipe.scheduler) if name.startswith("_cvg")},
        dict(pipe.text_encoder._forward_pre_hooks),
        dict(denoiser._forward_pre_hooks),
        dict(denoiser._forward_hooks),
        {name for name, module in denoiser.named_modules() if any("_cvg" in own for own in vars(module))},
        [parameter.requires_grad for parameter in denoiser.parameters()],
        {name: id(module.processor) for name, module in denoiser.named_modules() if hasattr(module, "processor")},
    )


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", NAMES)
def test_everything_is_put_back(name):
    pipe, options = BUILDERS[name]()
    run(pipe, options)
    before = leftovers(pipe)
    with guide(WORDS).attach(pipe):
        for _ in range(2):
            run(pipe, options)
            assert leftovers(pipe)[2:] == before[2:]  # between two calls nothing is left but a class of the pipeline
    assert leftovers(pipe) == before
    with pytest.raises(cvg.ArgumentError, match="'bird' is not in the prompt"), guide(["bird"]).attach(pipe):
        run(pipe, options)
    assert leftovers(pipe) == before


@pytest.mark.drawn(8, of="long tests")
def test_capture_beside_guidance_sees_the_pipeline_only():
    pipe, options = animatediff()
    with cvg.capture(pipe, words=WORDS) as alone:
        run(pipe, options)
    with guide(WORDS, iterations=3).attach(pipe), cvg.capture(pipe, words=WORDS) as beside:
        run(pipe, options)
    assert [(r.step, r.layer, r.branch) for r in beside.records] == [
        (r.step, r.layer, r.branch) for r in alone.records
    ]


def test_early_stop():
    """Steps that needed no update are not guided, and if none did, that is said."""
    pipe, options = animatediff()
    nothing = pytest.warns(cvg.GuidanceWarning, match="every loss was below its threshold")
    with nothing, guide(WORDS, iterations=5, thresholds=2.0).attach(pipe) as made:
        guided = run(pipe, options)
    assert len(made.history) == 2 and made.guided == []  # one look a step, no update
    assert torch.equal(guided, run(pipe, options))


OPTIONS = {
    "hard": {"flow": "hard"},
    "cross": {"flow": "cross"},
    "variance": {"loss": "variance"},
    "max": {"combine": "max"},
    "add": {"residual": "add"},
    "no-residual": {"residual": None},
    "bare-flow": {"normalize": False},
    "one-level": {"levels": [(5, 7)]},
    "adam": {"step_rule": "adam", "step_size": 0.01},
    "sgd": {"step_rule": "sgd", "step_size": 1.0},
    "decay": {"step_decay": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.drawn(6)
def test_every_option_guides(name):
    pipe, options = animatediff()
    stock = run(pipe, options)
    with guide(WORDS, **OPTIONS[name]).attach(pipe) as made:
        guided = run(pipe, options)
    assert torch.isfinite(guided).all() and not torch.equal(guided, stock)
    assert all(torch.isfinite(entry["gradient_norm"]).all() for entry in made.history)


@pytest.mark.drawn(8, of="long tests")
def test_presets():
    pipe, options = animatediff()
    released, paper = cvg.Vico.released(WORDS), cvg.Vico.paper(WORDS, iterations=2)
    assert (released.residual, released.combine, released.step_rule) == ("average", "mean", "adam")
    assert (paper.residual, paper.combine, paper.thresholds) == ("add", "max", 0.2)
    with replace(released, thresholds=0.0).attach(pipe) as made:
        run(pipe, options)
    assert [entry["step"] for entry in made.history] == [0] * 10 + [1]
    with paper.attach(pipe) as made:
        run(pipe, options)
    assert len(made.history) == 4


def test_words_as_a_function_of_the_prompt():
    pipe, options = animatediff()
    with guide(lambda prompt: prompt.split()[-1:]).attach(pipe) as made:
        run(pipe, options, [PROMPT, "a dog and a cat"])
    assert [list(scores) for scores in made.history[0]["scores"]] == [["dog"], ["cat"]]


def test_words_of_the_prompt():
    assert content_words("a red cat and a blue dog") == [("red", 0), ("cat", 0), ("blue", 0), ("dog", 0)]
    assert content_words("A cat and a cat") == [("cat", 0), ("cat", 1)]
    with pytest.raises(cvg.ArgumentError, match="has no content word"):
        content_words("and the")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"flow": "best"}, "flow must be one of 'soft', 'hard', 'exact', 'rollout', 'cross', got 'best'"),
        ({"loss": "max"}, "loss must be one of"),
        ({"residual": "mean"}, "residual must be one of"),
        ({"step_rule": "lion"}, "step_rule must be one of"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"stop": 1.5}, r"stop must be a finite number in \[0, 1\], got 1.5"),
        ({"step_size": -1.0}, "step_size must be a finite number of at least 0, got -1.0"),
        ({"words": []}, "words must name at least one word"),
        (
            {"words": "cat"},
            "words must be a list of words, a function of the prompt, or 'content' or 'nouns_and_verbs', got 'cat'",
        ),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.Vico(**change)


def test_a_level_that_is_not_there_is_named():
    pipe, options = animatediff()
    with (
        pytest.raises(cvg.ArgumentError, match=r"levels=\[\(9, 9\)\] has no layer; the grids there: "),
        guide(WORDS, levels=[(9, 9)]).attach(pipe),
    ):
        run(pipe, options)


def test_step_rules():
    latents, gradient = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(LatentStepper("sgd", 0.5)(latents, gradient), latents - 0.5 * gradient)
    moved = LatentStepper("normalized", 0.1)(latents, gradient) - latents
    torch.testing.assert_close(
        moved.flatten(1).norm(dim=1), 0.1 * latents.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6
    )
    adam = LatentStepper("adam", 0.01)
    torch.testing.assert_close(adam(latents, gradient), latents - 0.01 * gradient.sign(), rtol=1e-3, atol=1e-5)


def test_losses():
    peaks = torch.tensor([[0.9, 0.4], [0.2, 0.2]])
    torch.testing.assert_close(fairness_loss(peaks), torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(fairness_loss(peaks, "variance"), torch.tensor([0.125, 0.0]))
