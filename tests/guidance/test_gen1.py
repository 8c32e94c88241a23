"""Gen-1's temporal guidance on two pipelines: an image model that is one, the formula, and nothing left behind."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import Together, temporal_layers_off  # noqa: E402
from cvg_kernels.guidance.methods import method_named  # noqa: E402
from cvg_kernels.pipeline.layers import attention_layers  # noqa: E402
from cvg_kernels.pipeline.temporal_layers import temporal_modules  # noqa: E402
from tests.guidance.gen1_runs import SCALE, Calls, build  # noqa: E402
from tests.offline_pipelines import PROMPT, run, wan  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["animatediff", "modelscope"]


def inputs(pipe, options, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and text of a denoiser call of `batch` samples."""
    per_frame = isinstance(pipe, diffusers.AnimateDiffPipeline)
    latents = torch.randn(batch, 4, options["num_frames"], 5, 7)
    width = pipe.unet.config.cross_attention_dim
    text = torch.randn(batch, 6, width)
    return latents, text.repeat_interleave(options["num_frames"], 0) if per_frame else text


def formula(pipe, call, temporal_scale: float, guided: bool = True) -> torch.Tensor:
    """The prediction of a step by separate forward passes, written out in float64 at the end."""
    (latents, timestep, *_), kwargs = call
    text = kwargs["encoder_hidden_states"]
    unet = pipe.unet
    with torch.no_grad():
        if not guided:
            with temporal_layers_off(unet):
                image = unet(latents, timestep, encoder_hidden_states=text)[0].double()
            video = unet(latents, timestep, encoder_hidden_states=text)[0].double()
            return image + temporal_scale * (video - image)
        (z, _), (without, with_prompt) = latents.chunk(2), text.chunk(2)
        with temporal_layers_off(unet):
            image = unet(z, timestep, encoder_hidden_states=without)[0].double()
        uncond = unet(z, timestep, encoder_hidden_states=without)[0].double()
        cond = unet(z, timestep, encoder_hidden_states=with_prompt)[0].double()
    return image + temporal_scale * (uncond - image) + SCALE * (cond - uncond)


def as_video(prediction: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """ModelScope hands [B·F, C, h, w] to its scheduler."""
    if prediction.ndim == 5:
        return prediction
    return prediction.unflatten(0, (like.shape[0], -1)).transpose(1, 2)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_without_temporal_layers_a_frame_is_alone(name):
    """A change of one frame reaches the others through the temporal layers, every one of them, and through nothing
    else.
    """
    pipe, options = build(name)
    latents, text = inputs(pipe, options, batch=2)
    changed = latents.clone()
    changed[:, :, 1] += 0.5

    @torch.no_grad()
    def difference():
        predict = lambda z: pipe.unet(z, 10, encoder_hidden_states=text)[0]
        return (predict(changed) - predict(latents)).abs().amax((0, 1, 3, 4))  # [F]

    assert (difference() > 1e-4).all()
    with temporal_layers_off(pipe.unet):
        alone = difference()
    others = [frame for frame in range(options["num_frames"]) if frame != 1]
    assert alone[1] > 1e-2 and not alone[others].any()
    off = temporal_modules(pipe.unet)
    for left_on in off:
        with temporal_layers_off(pipe.unet):
            del left_on.forward
            assert (difference()[others] > 0).any()


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temporal_scale", [0.0, 0.5, 1.5, 3.0])
def test_the_formula(name, temporal_scale):
    pipe, options = build(name)
    with Calls(pipe) as seen, cvg.Gen1(temporal_scale).attach(pipe):
        run(pipe, options)
    assert len(seen.used) == 3 and seen.evaluations == 2 * 3
    for call, used in zip(seen.calls, seen.used, strict=True):
        wanted = formula(pipe, call, temporal_scale)
        torch.testing.assert_close(as_video(used, wanted).double(), wanted, rtol=1e-4, atol=1e-4)
    plain = formula(pipe, seen.calls[0], 1.0)
    assert (wanted - formula(pipe, seen.calls[-1], 1.0)).abs().max() > 0.05 * plain.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_without_classifier_free_guidance(name):
    """One branch: its own image prediction takes the place of the unconditional one."""
    pipe, options = build(name)
    options["guidance_scale"] = 1.0
    with Calls(pipe) as seen, cvg.Gen1(2.0).attach(pipe):
        run(pipe, options)
    for call, used in zip(seen.calls, seen.used, strict=True):
        wanted = formula(pipe, call, 2.0, guided=False)
        torch.testing.assert_close(as_video(used, wanted).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_temporal_scale_of_one_is_the_pipeline_itself(name):
    pipe, options = build(name)
    stock = run(pipe, options)
    with Calls(pipe) as seen, cvg.Gen1(1.0).attach(pipe):
        assert torch.equal(run(pipe, options), stock)
    assert seen.evaluations == 3
    with cvg.Gen1(1.5).attach(pipe):
        assert not torch.equal(run(pipe, options), stock)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(
    "start, stop, guided", [(0.0, 1.0, [0, 1, 2]), (0.0, 0.5, [0, 1]), (0.5, 1.0, [2]), (0.3, 0.3, [])]
)
def test_the_range_of_steps(start, stop, guided):
    pipe, options = build("animatediff")
    with Calls(pipe) as seen, cvg.Gen1(2.0, start=start, stop=stop).attach(pipe):
        run(pipe, options)
    assert seen.evaluations == 3 + len(guided)
    for step, (call, used) in enumerate(zip(seen.calls, seen.used, strict=True)):
        wanted = formula(pipe, call, 2.0 if step in guided else 1.0)
        torch.testing.assert_close(used.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_see_each_other(name):
    pipe, options = build(name)
    size = (4, 5, 7) if name == "animatediff" else (4, 8, 8)
    noise, prompts = torch.randn(2, 4, *size), [PROMPT, "a dog and a red cat"]
    with cvg.Gen1(2.0).attach(pipe):
        together = run(pipe, options, prompts, latents=noise)
        for sample in range(2):
            alone = run(pipe, options, prompts[sample], latents=noise[sample : sample + 1])
            torch.testing.assert_close(together[sample], alone[0], rtol=1e-3, atol=1e-3)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_schedulers(scheduler):
    """Also one that scales the denoiser's input."""
    pipe, options = build("animatediff")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with Calls(pipe) as seen, cvg.Gen1(2.0).attach(pipe):
        run(pipe, options)
    assert seen.evaluations == 6
    wanted = formula(pipe, seen.calls[1], 2.0)
    torch.testing.assert_close(seen.used[1].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    pipe, options = build("animatediff")
    pipe.to(dtype=dtype)
    with Calls(pipe) as seen, cvg.Gen1(1.5).attach(pipe):
        assert torch.isfinite(run(pipe, options)).all()
    assert {used.dtype for used in seen.used} == {dtype}


def leftovers(pipe):
    """Everything that an attachment may touch; the class of the pipeline and what goes with it first."""
    return (
        (type(pipe), {name for name in vars(pipe) if name.startswith("_cvg")}),
        {"encode_prompt"} & set(vars(pipe)),
        (type(pipe.scheduler), set(vars(pipe.scheduler))),
        [(name, len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in pipe.unet.named_modules()],
        [(name, set(vars(module))) for name, module in pipe.unet.named_modules()],
        {layer.name: id(layer.module.processor) for layer in attention_layers(pipe.unet)},
    )


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_everything_is_put_back(name):
    pipe, options = build(name)
    stock = run(pipe, options)
    before = leftovers(pipe)
    with cvg.Gen1(2.0).attach(pipe):
        run(pipe, options)
        inside = leftovers(pipe)
    assert inside[0] != before[0] and inside[1:] == before[1:]  # there for the length of a call
    assert leftovers(pipe) == before
    assert torch.equal(run(pipe, options), stock)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("evaluation", [1, 2], ids=["video model", "image model"])
def test_everything_is_put_back_after_an_exception(name, evaluation):
    pipe, options = build(name)
    run(pipe, options)
    before = leftovers(pipe)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == evaluation:
            raise KeyboardInterrupt

    hook = pipe.unet.conv_norm_out.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), cvg.Gen1(2.0).attach(pipe):
        run(pipe, options)
    hook.remove()
    assert leftovers(pipe) == before


def test_a_forward_that_was_there_stays():
    """As offloading hooks put one on a module."""
    pipe, options = build("animatediff")
    seen = []
    module, denoiser = temporal_modules(pipe.unet)[0], pipe.unet
    for part in (module, denoiser):
        stock = part.forward

        def forward(*args, stock=stock, part=part, **kwargs):
            seen.append(part)
            return stock(*args, **kwargs)

        part.forward = forward
    before = (module.forward, denoiser.forward)
    with cvg.Gen1(2.0).attach(pipe):
        run(pipe, options)
    assert (module.forward, denoiser.forward) == before
    assert seen.count(denoiser) == 6 and seen.count(module) == 3


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("outside", ["capture", "guidance"])
def test_a_capture_sees_the_pipeline_only(outside):
    """Whichever was entered first: as many records, of the same shapes, and the same video."""
    pipe, options = build("animatediff")
    with cvg.Gen1(2.0).attach(pipe):
        alone = run(pipe, options)
    contexts = [cvg.capture(pipe, words=["cat"], temporal=True), cvg.Gen1(2.0).attach(pipe)]
    if outside == "guidance":
        contexts.reverse()
    before = leftovers(pipe)
    with contexts[0] as first, contexts[1] as second:
        both = run(pipe, options)
    assert leftovers(pipe) == before
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-3)
    captured = first if outside == "capture" else second
    layers = [layer for layer in attention_layers(pipe.unet) if layer.kind != "self"]
    assert len(captured.records) == 3 * 2 * len(layers)
    assert {record.maps.shape[0] for record in captured.records} == {1}


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", NAMES)
def test_beside_vico(name):
    """Vico's own calls are left alone; its moved latents reach the image model too."""
    pipe, options = build(name)
    vico = {"words": ["cat", "dog"], "stop": 0.5, "iterations": 1}
    with cvg.Gen1(2.0).attach(pipe):
        alone = run(pipe, options)
    before = leftovers(pipe)
    still = Together((cvg.Vico(**vico, step_size=0.0), cvg.Gen1(2.0)))
    with Calls(pipe) as seen, still.attach(pipe) as made:
        assert torch.equal(run(pipe, options), alone)
    assert seen.evaluations == 2 * 3 + 2  # two guided steps of one update
    assert [entry["step"] for entry in made.history] == [0, 1]
    assert leftovers(pipe) == before

    moving = Together((cvg.Gen1(2.0), cvg.Vico(**vico, step_size=0.05)))
    with Calls(pipe) as seen, moving.attach(pipe):
        run(pipe, options)
    last = seen.calls[-1]
    wanted = formula(pipe, last, 2.0)
    torch.testing.assert_close(as_video(seen.used[-1], wanted).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", ["vstar", "gen1"])
def test_beside_vstar(name, first):
    """The image model sees the text without the prompt as it is: texts of frames are for the conditional samples."""
    pipe, options = build(name)
    methods = [cvg.VSTAR(prompts=["a red cat", "a blue dog"]), cvg.Gen1(2.0)]
    together = Together(tuple(methods if first == "vstar" else reversed(methods)))
    before = leftovers(pipe)
    texts = []
    cross = next(layer for layer in attention_layers(pipe.unet) if layer.kind == "cross").module
    forward = cross.forward

    def note(*args, **kwargs):
        texts.append(kwargs["encoder_hidden_states"])
        return forward(*args, **kwargs)

    with Calls(pipe) as seen, together.attach(pipe):
        cross.forward = note
        run(pipe, options)
        del cross.forward
    assert leftovers(pipe) == before and seen.evaluations == 6
    frames = options["num_frames"]
    for both, image in zip(texts[::2], texts[1::2], strict=True):
        assert len(both) == 2 * frames and torch.equal(image, both[:frames])
        assert torch.equal(image, image[:1].expand_as(image))
        assert not torch.equal(both[frames], both[-1])


def test_which_denoisers():
    with pytest.raises(cvg.ArgumentError, match="must have temporal layers of its own.*got Wan"):
        cvg.Gen1(2.0).attach(wan()[0])
    pipe, _ = build("animatediff")
    with pytest.raises(
        cvg.ArgumentError, match="pipe must be a diffusers pipeline with a scheduler, got UNetMotionModel"
    ):
        cvg.Gen1(2.0).attach(pipe.unet)


@pytest.mark.drawn(12, of="compiled networks")
def test_compiled_temporal_layers_can_be_left_out(caplog):
    """They run as they were written while attached to, with a line in the log, and compiled before and after."""
    compiled = []

    def backend(graph, inputs):  # what torch.compile hands the traced code to
        compiled.append(graph)
        return graph.forward

    pipe, options = build("animatediff")
    stock = run(pipe, options)
    with cvg.Gen1(2.0).attach(pipe):
        wanted = run(pipe, options)
    for part, name in ((temporal_modules(pipe.unet)[0], r"down_blocks\.0"), (pipe.unet, "UNetMotionModel")):
        part.compile(backend=backend)
        with cvg.Gen1(2.0).attach(pipe):
            torch.testing.assert_close(run(pipe, options), wanted)
        assert re.search(f"{name}.* compiled; while attached to, it runs uncompiled", caplog.text)
        assert not compiled
        torch.testing.assert_close(run(pipe, options), stock, rtol=1e-4, atol=1e-4)
        assert compiled
        part._compiled_call_impl = None
        compiled.clear()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temporal_scale": float("nan")}, "temporal_scale must be a finite number, got nan"),
        ({"stop": 1.5}, r"stop must be a finite number in \[0, 1\], got 1.5"),
        ({"start": 0.6, "stop": 0.5}, "start must not be larger than stop, got 0.6 and 0.5"),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.Gen1(**change)


def test_by_name():
    assert method_named("gen1:temporal_scale=2", words=["cat"]) == cvg.Gen1(2)
