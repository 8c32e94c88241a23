"""Runs that are interrupted, repeated, unguided, batched, or under another mode of torch; with every method."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.pipeline.layers import attention_layers  # noqa: E402
from tests.offline_pipelines import noise  # noqa: E402
from tests.pipeline.matrix import METHODS, ROUNDING, WORDS, Built  # noqa: E402
from tests.pipelines import PIPELINES, PROMPT, denoisers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

#: One of each way to call a network: with PAG and without, frame by frame, with a timestep a token, joint attention.
FAMILIES = ["animatediff_pag", "modelscope", "latte", "wan22_ti2v_image", "cogvideox_i2v"]
#: Those that begin later in their schedule, go through it twice, or have two networks for it.
SHORTENED = ["animatediff_v2v", "animatediff_freeinit", "wan_v2v", "wan22", "cogvideox_v2v"]
#: Those that make several videos at once.
BATCHED = ["animatediff", "animatediff_pag", "modelscope", "latte", "wan", "wan22", "cogvideox"]


def accepted(names):
    """Pairs (pipeline, method) without those that are refused; all of them are in test_matrix.py."""
    chosen = {key: method for key, method in METHODS.items() if key != "vico_cross"}
    return [(name, key) for name in names for key, method in chosen.items() if not method.refused(PIPELINES[name])]


on_families = pytest.mark.parametrize(("built", "name"), accepted(FAMILIES), indirect=["built"])


@on_families
@pytest.mark.drawn(14)
def test_an_interrupted_run_leaves_nothing_for_the_next(built, name):
    """Ctrl-C in the first call of a layer (a method's own call, or the pipeline's), and in a later one."""
    method = METHODS[name]
    with method(built).attach(built.pipe):
        clean = built.run()
    middle = attention_layers(denoisers(built.pipe)[0])[1].module

    def interrupted(at):
        calls = iter(range(at))

        def interrupt(*_):
            if next(calls, None) is None:
                raise KeyboardInterrupt

        return middle.register_forward_pre_hook(interrupt)

    with method(built).attach(built.pipe) as run:
        for at in (0, 2):
            with interrupted(at), pytest.raises(KeyboardInterrupt):
                built.run()
            assert torch.equal(built.run(), clean)
    guided = [step for _, step in built.guided(0, method.stop)]
    steps = [[step for call, step in run.guided if call == number] for number in range(4)]
    assert steps[1] == steps[3] == guided
    assert all(steps[number] == guided[: len(steps[number])] for number in (0, 2))
    assert run.calls == 4
    built.runs_as_before()


@pytest.mark.drawn(6)
@pytest.mark.parametrize("built", FAMILIES, indirect=True)
def test_capture_after_an_interrupted_run(built):
    with cvg.capture(built.pipe, WORDS) as clean:
        built.run()
    middle = attention_layers(denoisers(built.pipe)[0])[1].module

    def interrupt(*_):
        raise KeyboardInterrupt

    with cvg.capture(built.pipe, WORDS) as captured:
        with middle.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
            built.run()
        lost = len(captured.records)
        built.run()
    assert [record.run for record in captured.records[lost:]] == [1] * len(clean.records)
    for record, want in zip(captured.records[lost:], clean.records, strict=True):
        assert (record.step, record.layer, record.branch) == (want.step, want.layer, want.branch)
        assert torch.equal(record.maps, want.maps)
    built.runs_as_before()


@pytest.mark.parametrize(
    ("built", "name"),
    [pair for pair in accepted(SHORTENED) if pair[1] != "synopsis"],  # that is for all steps
    indirect=["built"],
)
@pytest.mark.drawn(6)
def test_the_steps_between_two_shares(built, name):
    with METHODS[name](built, start=1 / 3, stop=2 / 3).attach(built.pipe) as run:
        video = built.run()
    assert run.guided == built.guided(1 / 3, 2 / 3) == [(0, 1)] * built.case.rounds
    assert (video - built.stock).abs().max() > ROUNDING
    built.is_as_before()


@pytest.mark.drawn(8, of="long tests")
def test_pag_after_a_run_that_failed_without_us():
    """It has left its processors, with which a method could not call the network."""
    built = Built.of("animatediff_pag")
    with METHODS["cvg"](built).attach(built.pipe):
        clean = built.run()

    def interrupt(*_):
        raise KeyboardInterrupt

    last = attention_layers(built.pipe.unet)[-1].module
    with last.register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        built.run()
    with METHODS["cvg"](built).attach(built.pipe):
        assert torch.equal(built.run(), clean)


@on_families
@pytest.mark.drawn(9)
def test_without_classifier_free_guidance(built, name):
    method = METHODS[name]
    stock = built.run(guidance_scale=1.0)
    with method(built).attach(built.pipe) as run:
        video = built.run(guidance_scale=1.0)
    assert run.guided == built.guided(0, method.stop)
    assert video.isfinite().all() and (video - stock).abs().max() > ROUNDING
    with method(built, 0).attach(built.pipe):
        video = built.run(guidance_scale=1.0)
    torch.testing.assert_close(video, stock, rtol=0 if method.exact else 1e-4, atol=0 if method.exact else ROUNDING)
    built.is_as_before()


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("built", FAMILIES, indirect=True)
def test_capture_without_classifier_free_guidance(built):
    with cvg.capture(built.pipe, WORDS) as captured:
        built.run(guidance_scale=1.0)
    there = [branch for branch in built.case.branches if branch != "uncond"]
    assert {record.branch for record in captured.records} == set(there)
    layers = {record.layer for record in captured.records}
    assert len(captured.records) == len(layers) * built.steps * len(there)
    built.is_as_before()


@on_families
@pytest.mark.drawn(9)
def test_in_inference_mode(built, name):
    method = METHODS[name]
    with method(built).attach(built.pipe):
        usual = built.run()
    with torch.inference_mode(), method(built).attach(built.pipe) as run:
        video = built.run()
    assert run.guided == built.guided(0, method.stop)
    assert torch.equal(video, usual)
    built.is_as_before()


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("built", FAMILIES, indirect=True)
def test_capture_in_inference_mode(built):
    with cvg.capture(built.pipe, WORDS) as usual:
        built.run()
    with torch.inference_mode(), cvg.capture(built.pipe, WORDS) as captured:
        built.run()
    assert torch.equal(captured.heat_map("cat"), usual.heat_map("cat"))
    built.runs_as_before()


@pytest.mark.drawn(6)
@pytest.mark.parametrize("built", FAMILIES, indirect=True)
def test_capture_under_autocast(built):
    """The rows of softmax in bfloat16 have 8 bits, and so do the queries and keys."""
    with cvg.capture(built.pipe, WORDS) as exact:
        built.run()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about norms that it does not fuse
        stock = built.run()
        with cvg.capture(built.pipe, WORDS) as captured:
            video = built.run()
    torch.testing.assert_close(video, stock, rtol=0.05, atol=0.05 * float(stock.abs().max()))
    for record, want in zip(captured.records, exact.records, strict=True):
        assert record.maps.dtype == torch.float32
        if record.step == 0:  # later steps start from other latents
            torch.testing.assert_close(record.maps, want.maps, rtol=0.1, atol=0.01)
    built.runs_as_before()


@pytest.mark.parametrize(("built", "name"), accepted(BATCHED), indirect=["built"])
@pytest.mark.drawn(12)
def test_each_video_of_a_batch_is_as_alone(built, name):
    """Also where its words stand in another order."""
    prompts = [PROMPT, "a blue dog and a red cat"]
    start = noise(built.case.name, built.pipe, 2)

    def call(prompt, latents, size):
        with METHODS[name](built).attach(built.pipe) as run:
            video = built.run(prompt, latents=latents)
        assert run.guided == built.guided(0, METHODS[name].stop) and len(video) == size
        return video

    together = call(prompts, start, 2)
    for sample, prompt in enumerate(prompts):
        alone = call(prompt, start[sample : sample + 1], 1)
        torch.testing.assert_close(together[sample : sample + 1], alone, rtol=1e-3, atol=1e-3)
    built.is_as_before()


@pytest.mark.drawn(6)
@pytest.mark.parametrize("built", BATCHED, indirect=True)
def test_maps_of_each_video_of_a_batch_are_as_alone(built):
    prompts = [PROMPT, "a blue dog and a red cat"]
    start = noise(built.case.name, built.pipe, 2)

    def call(prompt, latents):
        with cvg.capture(built.pipe, WORDS) as captured:
            built.run(prompt, latents=latents)
        return captured.records

    together = call(prompts, start)
    for sample, prompt in enumerate(prompts):
        alone = call(prompt, start[sample : sample + 1])
        for both, one in zip(together, alone, strict=True):
            assert (both.step, both.layer, both.branch) == (one.step, one.layer, one.branch)
            torch.testing.assert_close(both.maps[sample], one.maps[0], rtol=1e-3, atol=1e-5)
    built.is_as_before()
