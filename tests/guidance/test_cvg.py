"""CVG on three pipelines: right in its gradient, a step down the loss, clear in its errors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.composition import FeatureReader  # noqa: E402
from cvg_kernels.guidance import Guidance, Together  # noqa: E402
from cvg_kernels.prompts.token_table import TokenTable  # noqa: E402
from tests.composition.tiny import tiny_classifier  # noqa: E402
from tests.differences import assert_gradient  # noqa: E402
from tests.guidance.descending import assert_samples_apart  # noqa: E402
from tests.offline_pipelines import BUILDERS, PROMPT, animatediff, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = list(BUILDERS)


def guide(pipe, **options) -> cvg.CVG:
    """CVG in two of the three steps, with a classifier that reads their noise."""
    pipe.scheduler.set_timesteps(3)
    times = [float(at) for at in pipe.scheduler.timesteps[:2]]
    given = {"label": ["left", "up"], "step_size": 0.01, "iterations": 1, "stop": 2 / 3, **options}
    return cvg.CVG(tiny_classifier(pipe, times), **given)


def reading_in_float64(method: cvg.CVG) -> cvg.CVG:
    """The same with a classifier in float64."""
    method.reader.double().register_forward_pre_hook(lambda module, args: tuple(tensor.double() for tensor in args))
    return method


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_zero_changes_nothing(name):
    pipe, options = BUILDERS[name]()
    stock = run(pipe, options)
    with guide(pipe, step_size=0.0).attach(pipe) as made:
        guided = run(pipe, options)
    assert torch.equal(guided, stock)
    assert [entry["step"] for entry in made.history] == [0, 1]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_falls(name, normalize):
    pipe, options = BUILDERS[name]()
    size = 0.02 if normalize else 1.0
    with guide(pipe, iterations=5, step_size=size, normalize=normalize).attach(pipe) as made:
        run(pipe, options)
    first = [float(entry["loss"]) for entry in made.history if entry["step"] == 0]
    assert len(first) == 5 and first[-1] < first[0]
    assert made.history[0]["probabilities"].shape == (1, 2, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.drawn(8, of="long tests")
def test_the_gradient_is_that_of_finite_differences(name):
    """Through the whole of it: denoiser, attention with capture, aggregator, backbone, cross-entropy."""
    pipe, options = BUILDERS[name]()
    method = reading_in_float64(guide(pipe))
    pipe.to(dtype=torch.float64)
    checked = []

    class Probe(Guidance):
        def before_step(self, call, made):
            if call.index == 2:
                return
            entities = [method.entities(prompt) for prompt in call.prompts]
            table = TokenTable.of(call.find([[one.phrase for one in each] for each in entities]))

            def loss(z):
                maps = reader.read(lambda: call.denoise(z))
                return method.losses(maps, entities, call.timestep)[0].sum()

            with FeatureReader(call.denoiser, method.reader.selection, table) as reader:
                z = call.latents.double().requires_grad_()
                assert_gradient(loss, z, torch.autograd.grad(loss(z), z)[0])
            checked.append(call.index)

    with pytest.warns(cvg.GuidanceWarning, match="Probe did nothing"), Probe().attach(pipe):
        run(pipe, options)
    assert checked == [0, 1]


def test_plain_descent():
    """Without normalisation the step is η times the gradient of the loss."""
    pipe, options = animatediff()
    moved = []

    methods = [guide(pipe, step_size=size, normalize=False) for size in (1.0, 2.0)]

    class Look(Guidance):
        def before_step(self, call, made):
            if call.index == 0:
                moved.extend(method.before_step(call, made) - call.latents for method in methods)

    with pytest.warns(cvg.GuidanceWarning, match="Look did nothing"), Look().attach(pipe):
        run(pipe, options)
    assert moved[0].abs().max() > 0
    torch.testing.assert_close(moved[1], 2 * moved[0], rtol=1e-3, atol=1e-6)


@pytest.mark.drawn(8, of="long tests")
def test_samples_do_not_see_each_other():
    pipe, options = animatediff()
    method = reading_in_float64(guide(pipe, iterations=2))
    assert_samples_apart(method, pipe, options, torch.randn(2, 4, 4, 5, 7))


@pytest.mark.drawn(8, of="long tests")
def test_the_parameters_take_no_part():
    pipe, options = animatediff()
    method = guide(pipe)
    with method.attach(pipe):
        run(pipe, options)
    parameters = [*method.reader.parameters(), *pipe.unet.parameters()]
    assert all(p.requires_grad and p.grad is None for p in parameters)
    assert not method.reader.training


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_model(dtype):
    pipe, options = animatediff()
    method = guide(pipe)
    pipe.to(dtype=dtype)
    with method.attach(pipe) as made:
        frames = run(pipe, options)
    assert torch.isfinite(frames).all() and made.history[0]["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("label", "prompt", "expected"),
    [
        ("up", "a red cat", ["up"]),
        (None, "a red cat moving left and a blue dog", ["left", None]),
        ({"blue dog": "up"}, "a red cat moving left and a blue dog", ["left", "up"]),
        (["right", None], PROMPT, ["right", None]),
    ],
)
def test_labels(label, prompt, expected):
    pipe, _ = animatediff()
    found = guide(pipe, label=label).entities(prompt)
    assert [entity.label for entity in found] == expected


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "label must be given: the prompt 'a red cat and a blue dog' says none of left"),
        ("left", "label must have one entry per entity"),
        (["left", "sideways"], "label must be one of left, right, up, got 'sideways'"),
        ({"bird": "left"}, "label must name entities of the prompt"),
    ],
)
def test_labels_that_do_not_fit(label, message):
    pipe, options = animatediff()
    with pytest.raises(cvg.ArgumentError, match=message), guide(pipe, label=label).attach(pipe):
        run(pipe, options)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("steps", "a whole number of at least 0"),
        ("iterations", "a whole number of at least 0"),
        ("step_size", "a finite number of at least 0"),
        ("stop", r"a finite number in \[0, 1\]"),
        ("start", r"a finite number in \[0, 1\]"),
    ],
)
def test_numbers_are_checked(name, accepted):
    with pytest.raises(cvg.ArgumentError, match=f"^{name} must be {accepted}, got -1$"):
        cvg.CVG(**{name: -1})


def test_the_old_count_of_steps_still_works():
    pipe, options = animatediff()
    with pytest.warns(FutureWarning, match="steps is a share called stop now"):
        method = guide(pipe, steps=1)
    with method.attach(pipe) as made:
        run(pipe, options)
    assert [entry["step"] for entry in made.history] == [0]


def test_steps_of_other_noise_are_left_alone():
    pipe, options = animatediff()
    pipe.scheduler.set_timesteps(3)
    first, *others = [float(at) for at in pipe.scheduler.timesteps]
    method = cvg.CVG(tiny_classifier(pipe, [first, first - 10]), ["left", "up"], stop=1.0)
    with method.attach(pipe) as made:
        run(pipe, options)
    assert {entry["step"] for entry in made.history} == {0}
    method = cvg.CVG(tiny_classifier(pipe, others), ["left", "up"])
    with pytest.raises(cvg.ArgumentError, match="classifier must be one for"), method.attach(pipe):
        run(pipe, options)


def test_another_pipeline_is_refused():
    pipe, _ = animatediff()
    with pytest.raises(cvg.ArgumentError, match="classifier does not fit the pipeline"):
        guide(pipe).attach(BUILDERS["modelscope"]()[0])


@pytest.mark.drawn(8, of="long tests")
def test_together_with_vico():
    pipe, options = animatediff()
    method = guide(pipe)
    vico = cvg.Vico(words=["cat", "dog"], stop=0.5, iterations=1)
    frames = {}
    for name, one in (("cvg", method), ("both", Together((method, vico)))):
        with one.attach(pipe) as made:
            frames[name] = run(pipe, options)
    kinds = ["cvg" if "probabilities" in entry else "vico" for entry in made.history]
    assert kinds == ["cvg", "vico"] * 2
    assert not torch.equal(frames["cvg"], frames["both"])
    with pytest.raises(cvg.ArgumentError, match="methods must hold at least one"):
        Together(())
