"""How `StructureContentPipeline` is called:
batches, seeds, schedulers, pictures, interruptions, and what it refuses.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.editing.content import embed_texts, predict_image_embedding  # noqa: E402
from cvg_kernels.editing.given import clips_of, depth_of  # noqa: E402
from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.pipeline.temporal_layers import temporal_layers_off  # noqa: E402
from cvg_kernels.shapes.train_prior import build_prior_scheduler  # noqa: E402
from tests.editing.tiny import tiny_editor  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents_of(pipe, **options):
    """What two steps make of a call, as latents."""
    options = {"prompt": "a blue square", "num_inference_steps": 2} | options
    return pipe(output_type="latent", **options).frames


@pytest.fixture
def clips():
    return torch.rand(2, 3, 3, 64, 64)


@pytest.fixture
def scheduled(editor):
    """Gives the editor another scheduler for the length of a test."""
    own = editor.scheduler
    yield lambda kind: setattr(editor, "scheduler", getattr(diffusers, f"{kind}Scheduler").from_config(own.config))
    editor.scheduler = own


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("kind", ["DDIM", "EulerDiscrete", "UniPCMultistep"])
def test_noise_that_is_given_is_as_noise_that_is_drawn(editor, clips, scheduled, kind):
    scheduled(kind)
    noise = torch.randn(1, 4, 3, 8, 8, generator=generators(7)[0])
    drawn = latents_of(editor, video=clips[0], generator=generators(7)[0])
    assert torch.equal(latents_of(editor, video=clips[0], latents=noise), drawn)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("kind", ["EulerAncestralDiscrete", "DDPM", "LCM"])
def test_schedulers_that_draw_noise_follow_the_generator(editor, clips, scheduled, kind):
    scheduled(kind)
    both = latents_of(editor, video=clips, generator=generators(3, 4))
    for number, seed in enumerate((3, 4)):
        alone = latents_of(editor, video=clips[number], generator=generators(seed)[0])
        torch.testing.assert_close(both[number], alone[0], rtol=0, atol=1e-3)
    assert torch.equal(both, latents_of(editor, video=clips, generator=generators(3, 4)))


def test_a_clip_of_a_batch_is_the_clip_alone_with_a_diffusion_prior(editor, clips):
    editor.register_modules(prior_scheduler=build_prior_scheduler())
    try:
        both = latents_of(editor, video=clips, generator=generators(3, 4))
        alone = latents_of(editor, video=clips[1], generator=generators(4)[0])
    finally:
        editor.register_modules(prior_scheduler=None)
    torch.testing.assert_close(both[1], alone[0], rtol=0, atol=1e-3)


def test_one_text_in_a_list_is_for_all_clips(editor, clips):
    seeds = {"generator": generators(1, 2), "video": clips}
    wanted = latents_of(editor, prompt="a red circle", negative_prompt="a cross", **seeds)
    seeds["generator"] = generators(1, 2)
    found = latents_of(editor, prompt=["a red circle"], negative_prompt=["a cross"], **seeds)
    assert torch.equal(found, wanted)
    seeds["generator"] = generators(1, 2)
    found = latents_of(editor, prompt=("a red circle",) * 2, negative_prompt=["a cross"], **seeds)
    assert torch.equal(found, wanted)


@pytest.mark.drawn(6)
@pytest.mark.parametrize(
    "method",
    [cvg.Gen1(temporal_scale=2.0), cvg.VSTAR(), cvg.Vico(words=["blue", "square"])],
    ids=lambda method: type(method).__name__,
)
def test_methods_guide_each_clip_of_a_batch_as_alone(editor, clips, method):
    plain = latents_of(editor, video=clips, generator=generators(3, 4))
    with method.attach(editor):
        both = latents_of(editor, video=clips, generator=generators(3, 4))
        alone = latents_of(editor, video=clips[1], generator=generators(4)[0])
    assert all((both[at] - plain[at]).abs().max() > 1e-3 for at in (0, 1))
    torch.testing.assert_close(both[1], alone[0], rtol=0, atol=1e-3)


def test_the_temporal_scale_is_the_formula(editor, clips):
    """v = v_π + ω_t (v_∅ − v_π) + ω (v_c − v_∅), from the denoiser's own calls."""
    noise, scale, temporal = torch.randn(1, 4, 3, 8, 8), 2.5, 1.7
    call = {"video": clips[0], "guidance_scale": scale, "num_inference_steps": 1}
    given = []
    handle = editor.unet.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    latents_of(editor, latents=noise, **call)
    handle.remove()
    ((sample, timestep), options) = given[0]
    with torch.no_grad():
        v_0, v_c = editor.unet(sample, timestep, **options)[0].chunk(2)
        with temporal_layers_off(editor.unet):
            v_i = editor.unet(sample, timestep, **options)[0][:1]
        editor.scheduler.set_timesteps(1)
        v = v_i + temporal * (v_0 - v_i) + scale * (v_c - v_0)
        wanted = editor.scheduler.step(v, timestep, noise).prev_sample
    with cvg.Gen1(temporal_scale=temporal).attach(editor):
        found = latents_of(editor, latents=noise, **call)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("side", [64, 96, 40])
def test_every_form_of_a_clip_is_resized_alike(side):
    """Lists of PIL, arrays and tensors, one clip or a batch: the same frames, smoothly resized."""
    pixels = np.random.default_rng().integers(256, size=(3, side, side, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    forms = [[Image.fromarray(one) for one in pixels], pixels, pixels / 255, tensor, tensor / 255]
    forms += [list(pixels), list(tensor / 255), [list(tensor / 255)], (tensor / 255)[None]]
    wanted = interpolate(tensor / 255, (64, 64), mode="bilinear", antialias=True)[None]
    for form in forms:
        found = clips_of(form, (64, 64))
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("high, wide", [(64, 96), (96, 64), (50, 130)])
def test_a_clip_that_is_no_square_is_cut_and_not_squeezed(high, wide):
    """What is in the middle keeps its proportions; depth is cut as the frames are."""
    frames = torch.zeros(2, 3, high, wide)
    frames[..., high // 2 - 8 : high // 2 + 8, wide // 2 - 8 : wide // 2 + 8] = 1
    found = clips_of(frames, (64, 64))[0, 0, 0]
    side = round(16 * 64 / min(high, wide))
    seen = [int((found > 0.5).any(axis).sum()) for axis in (0, 1)]
    assert max(abs(one - side) for one in seen) <= 1
    depth = depth_of(frames[:, 0], None, (64, 64))
    torch.testing.assert_close(depth[0, 0], found)


def test_frames_of_several_sizes_are_refused(editor):
    frames = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 48))]
    with pytest.raises(ArgumentError, match="video must be frames of one size"):
        editor(video=frames, prompt="a blue square", num_inference_steps=1)


def test_a_negative_prompt_without_guidance_is_told(editor, clips):
    call = {"video": clips[0], "negative_prompt": "a red square", "num_inference_steps": 1}
    with pytest.warns(cvg.GuidanceWarning, match="negative_prompt has no effect"):
        editor(prompt="a blue square", guidance_scale=1.0, **call)
    with warnings.catch_warnings():
        warnings.simplefilter("error", cvg.GuidanceWarning)
        editor(prompt="a blue square", guidance_scale=3.0, **call)


@pytest.mark.drawn(8, of="long tests")
def test_pictures_of_pil_may_have_any_colours(editor, clips):
    grey = Image.fromarray(np.random.default_rng().integers(256, size=(64, 64), dtype=np.uint8))
    in_colour = grey.convert("RGB")
    for other in (grey, grey.convert("P"), grey.convert("RGBA")):
        for name in ("image", "video"):
            one, two = (
                latents_of(editor, **{"video": clips[0]} | {name: [picture]}, generator=generators(0)[0])
                for picture in (other, in_colour)
            )
            assert torch.equal(one, two)
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    one, two = (
        latents_of(editor, video=clips[0], image=picture, generator=generators(0)[0])
        for picture in (clear, Image.new("RGB", (64, 64), "white"))
    )
    assert torch.equal(one, two)
    with pytest.raises(ArgumentError, match="image must be pictures of 8 bits"):
        latents_of(editor, video=clips[0], image=Image.new("I;16", (64, 64)))


def test_depth_may_be_an_array(editor):
    depth = torch.rand(3, 64, 64)
    one, two = (latents_of(editor, depth=each, generator=generators(0)[0]) for each in (depth, depth.numpy()))
    assert torch.equal(one, two)


def test_the_range_of_distances_is_each_clips_own(editor, clips, monkeypatch):
    """A model of distances is cut off at a share of the largest, of the clip and not of the batch."""
    monkeypatch.setattr(editor.depth_estimator.config, "depth_estimation_type", "metric")
    monkeypatch.setattr(
        editor.depth_estimator,
        "forward",
        lambda pixel_values: type("Depth", (), {"predicted_depth": pixel_values[:, 0] + 1}),
    )
    clips[0] /= 1000  # far less than a hundredth of the other
    both = editor._depth(clips, None)
    torch.testing.assert_close(both[0], editor._depth(clips[:1], None)[0])


@pytest.mark.parametrize(("text", "warned"), [("a red circle", False), ("a red circle and " * 6, True)])
def test_words_that_are_not_read_are_told(editor, clips, text, warned):
    for given in ({"prompt": text}, {"negative_prompt": text}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            latents_of(editor, video=clips[0], **given)
        told = [each for each in caught if "the end of a prompt is not read" in str(each.message)]
        assert len(told) == warned
        assert not warned or told[0].filename == __file__


def test_an_interrupted_call_leaves_all_as_it_was(editor, clips):
    wanted = latents_of(editor, video=clips[0], generator=generators(0)[0])

    def stop(*_):
        raise KeyboardInterrupt

    for video in (clips[0], clips[0][:1]):  # a single frame is made without temporal layers
        with pytest.raises(KeyboardInterrupt):
            latents_of(editor, video=video, callback_on_step_end=stop)
    assert torch.equal(latents_of(editor, video=clips[0], generator=generators(0)[0]), wanted)


@pytest.mark.drawn(8, of="long tests")
def test_a_denoiser_in_the_wrapping_of_a_compiled_one_does_the_same(editor, clips):
    """Not traced here, which takes long."""
    wanted = latents_of(editor, video=clips[0], generator=generators(0)[0])
    own = editor.unet
    editor.unet = torch.compile(own)
    try:
        with torch.compiler.set_stance("force_eager"):
            found = latents_of(editor, video=clips[0], generator=generators(0)[0])
    finally:
        editor.unet = own
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.drawn(8, of="long tests")
def test_an_offloaded_encoder_is_fetched_for_images_and_for_texts(clips):
    pipe = tiny_editor()
    wanted = latents_of(pipe, video=clips[0], generator=generators(0)[0])
    pipe.enable_model_cpu_offload(device="cpu")
    found = latents_of(pipe, video=clips[0], generator=generators(0)[0])
    assert torch.equal(found, wanted)
    fetched = []

    def note(module, *args, **kwargs):
        fetched.append(module)
        return args, kwargs

    for content in ({}, {"image": clips[0][0]}):
        # the pipeline hooks itself anew at the end of a call
        pipe.content_encoder._hf_hook.pre_forward = note
        latents_of(pipe, video=clips[0], **content)
    assert fetched == [pipe.content_encoder] * 2


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_outputs_of_bfloat16_are_pictures(clips, output_type):
    pipe = tiny_editor().to(torch.bfloat16)
    made = pipe(video=clips[0], prompt="a", num_inference_steps=1, output_type=output_type, return_dict=False)[0]
    kind = {"pil": list, "np": np.ndarray, "pt": torch.Tensor}[output_type]
    assert isinstance(made, kind) and len(made[0]) == 3


@pytest.mark.parametrize("prompt", ["", None])
def test_words_that_the_call_does_not_have_are_asked_for(editor, clips, prompt):
    said = "prompt is not known, since the call has none: pass prompt=" if prompt is None else "blue"
    call = {"video": clips[0], "image": clips[0][0], "prompt": prompt}
    with pytest.raises(ArgumentError, match=said), cvg.Vico(words=["blue", "square"]).attach(editor):
        latents_of(editor, **call)
    with pytest.raises(ArgumentError, match=said), cvg.capture(editor, words=["blue"]):
        latents_of(editor, **call)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": 3}, "prompt must be a text or a list of texts, got 3"),
        ({"prompt": ["a", 1]}, "prompt must be a text or a list of texts"),
        ({"prompt": []}, "prompt must be one or one for each of 1 clips, got 0"),
        ({"negative_prompt": {"a": 1}}, "negative_prompt must be a text"),
        ({"negative_prompt": ["a"] * 3, "prompt": ["a"] * 2}, "one for each of 3"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_scale": "3"}, "guidance_scale must be a finite number, got '3'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1"),
        ({"num_inference_steps": -1}, "num_inference_steps must be"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be"),
        ({"generator": 3}, "generator must be a torch.Generator or one for each clip, got int"),
        ({"generator": [None]}, "generator must be a torch.Generator"),
        ({"generator": generators(0, 1)}, "generator must be one or one for each of 1 clips"),
        ({"prompt": ["a", "b"], "generator": generators(0)}, "one for each of 2 clips, got 1"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, got int"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            "callback_on_step_end_tensor_inputs must be a list of names among latents",
        ),
        ({"latents": [1]}, "latents must be a tensor"),
        ({"image": []}, "image must be one or one for each of 1 clips, got 0"),
        ({"image": "a.png"}, "image must be one image or one a clip, got str"),
    ],
)
def test_what_does_not_fit_is_named(editor, change, said):
    with pytest.raises(ArgumentError, match=said):
        latents_of(editor, **{"video": torch.rand(2, 3, 64, 64)} | change)


def test_texts_reach_the_prior_one_by_one(editor):
    """The embedding of a text does not depend on those beside it."""
    tokens = editor._tokens(["a red circle", "a blue square"])
    with torch.no_grad():
        texts = embed_texts(editor.content_encoder, tokens)
        both = predict_image_embedding(editor.prior, texts)
        alone = editor.encode_content(["a blue square"], None)
    torch.testing.assert_close(both[1], alone[0], rtol=0, atol=1e-5)
