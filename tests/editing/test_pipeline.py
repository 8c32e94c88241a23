"""`StructureContentPipeline`: what its denoiser is told, what it makes of it, and what it refuses."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.editing.content import content_tokens, embed_images  # noqa: E402
from cvg_kernels.editing.structure import structure_channels, structure_latents, structure_maps  # noqa: E402
from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.pipeline.temporal_layers import temporal_layers_off  # noqa: E402
from cvg_kernels.shapes.train_prior import build_prior_scheduler  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 2


def edit(pipe, seed=0, **options):
    """Frames as tensors; a few steps."""
    options = {"prompt": "a blue square", "num_inference_steps": STEPS, "output_type": "pt"} | options
    seeds = seed if isinstance(seed, list) else [seed]
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    return pipe(generator=generators if len(seeds) > 1 else generators[0], **options)


@contextmanager
def calls_of(pipe):
    """What the denoiser is given at each call."""
    seen = []

    def note(module, args, kwargs):
        seen.append({"sample": args[0], "text": kwargs["encoder_hidden_states"]})

    handle = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.drawn(6)
@pytest.mark.parametrize(("batch", "frames", "scale"), [(1, 8, 3.0), (2, 5, 3.0), (2, 1, 1.0)])
def test_shapes_of_all_that_goes_in_and_comes_out(editor, batch, frames, scale):
    video = torch.rand(batch, frames, 3, 64, 64)
    with calls_of(editor) as seen:
        made = edit(editor, list(range(batch)), video=video, guidance_scale=scale)
    branches = 2 if scale > 1 else 1
    assert len(seen) == STEPS
    for call in seen:
        assert call["sample"].shape == (branches * batch, 12, frames, 8, 8)
        assert call["text"].shape == (branches * batch * frames, 16 + 4, 64)
    assert made.frames.shape == (batch, frames, 3, 64, 64)
    assert made.structure.shape == (batch, frames, 64, 64)
    assert made.structure.min() >= 0 and made.structure.max() <= 1
    latents = edit(editor, list(range(batch)), video=video, output_type="latent").frames
    assert latents.shape == (batch, 4, frames, 8, 8)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("level", [0, 3, 7])
def test_both_branches_have_the_structure_and_one_of_them_the_content(editor, clip, level):
    with calls_of(editor) as seen:
        made = edit(editor, video=clip, structure=level, image=clip[0], negative_prompt="a circle")
    depth = editor._depth(clip[None], None)
    assert torch.equal(made.structure, structure_maps(depth, level))
    with torch.no_grad():
        latents = structure_latents(editor.vae, made.structure)
        content = content_tokens(embed_images(editor.content_encoder, clip[:1]), 64)
        words, negative = editor.encode_prompt("a blue square", negative_prompt="a circle")
    channels = structure_channels(latents, level)
    for call in seen:
        without, with_content = call["sample"][:, 4:]
        assert torch.equal(without, channels[0]) and torch.equal(with_content, channels[0])
        text = call["text"].unflatten(0, (2, 8))
        assert not text[0, :, 16:].any()
        torch.testing.assert_close(text[1, :, 16:], content.expand(8, -1, -1))
        assert torch.equal(text[0, 0, :16], negative[0]) and torch.equal(text[1, 0, :16], words[0])


def test_the_frames_are_those_of_the_definition(editor, clip):
    """v = v_∅ + ω (v_c − v_∅), by hand, with the scheduler."""
    scale, level = 2.5, 1
    noise = torch.randn(1, 4, 8, 8, 8)
    found = edit(editor, video=clip, structure=level, guidance_scale=scale, latents=noise, output_type="latent").frames
    with torch.no_grad():
        maps = structure_maps(editor._depth(clip[None], None), level)
        channels = structure_channels(structure_latents(editor.vae, maps), level)
        words, nothing = editor.encode_prompt("a blue square")
        content = content_tokens(editor.encode_content(["a blue square"], None), 64)
        texts = torch.cat([nothing, 0 * content], 1), torch.cat([words, content], 1)
        editor.scheduler.set_timesteps(STEPS)
        z = noise
        for t in editor.scheduler.timesteps:
            v_0, v_c = (
                editor.unet(torch.cat([z, channels], 1), t, encoder_hidden_states=text.repeat_interleave(8, 0)).sample
                for text in texts
            )
            z = editor.scheduler.step(v_0 + scale * (v_c - v_0), t, z).prev_sample
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)


@pytest.mark.drawn(8, of="long tests")
def test_levels_and_contents_make_a_difference_and_seeds_repeat(editor, clip):
    base = edit(editor, video=clip, structure=2).frames
    assert torch.equal(base, edit(editor, video=clip, structure=2).frames)
    for change in (
        {"structure": 3},
        {"prompt": "a red circle"},
        {"image": clip[3]},
        {"prompt": None, "image": clip[3]},
        {"negative_prompt": "a circle"},
        {"depth": torch.rand(8, 64, 64)},
    ):
        assert not torch.equal(base, edit(editor, **{"video": clip, "structure": 2} | change).frames)


@pytest.mark.drawn(8, of="long tests")
def test_clips_may_come_in_every_form(editor, clip):
    clip = (clip * 255).round() / 255
    arrays = clip.permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in arrays]
    wanted = edit(editor, video=clip).frames
    raw = (clip * 255).round().to(torch.uint8)
    forms = (clip[None], [clip], arrays, [arrays], images, [images], list(clip), raw)
    for form in (*forms, raw.permute(0, 2, 3, 1).numpy()):
        torch.testing.assert_close(edit(editor, video=form).frames, wanted, rtol=0, atol=2e-3)


@pytest.mark.drawn(8, of="long tests")
def test_one_clip_with_many_prompts_and_many_clips_with_one(editor, clip):
    prompts = ["a blue square", "a red circle"]
    both = edit(editor, [3, 4], video=clip, prompt=prompts).frames
    for number, prompt in enumerate(prompts):
        alone = edit(editor, 3 + number, video=clip, prompt=prompt).frames[0]
        torch.testing.assert_close(both[number], alone, rtol=0, atol=1e-4)
    clips = torch.stack([clip, clip.flip(0)])
    both = edit(editor, [3, 4], video=clips).frames
    images = edit(editor, [3, 4], video=clip, image=clip[:2], prompt=None).frames
    assert images.shape[0] == 2 and not torch.equal(images[0], images[1])
    torch.testing.assert_close(both[1], edit(editor, 4, video=clips[1]).frames[0], rtol=0, atol=1e-4)


@pytest.mark.drawn(8, of="long tests")
def test_depth_takes_the_place_of_a_clip_and_of_the_estimate(editor, clip):
    depth = editor._depth(clip[None], None)[0]
    wanted = edit(editor, video=clip).frames
    for given in ({"video": clip, "depth": depth}, {"depth": depth}):
        torch.testing.assert_close(edit(editor, **given).frames, wanted, rtol=0, atol=1e-4)
    depth = torch.rand(8, 64, 64)
    one, other = (edit(editor, depth=each).structure for each in (depth, 3 * depth[None] + 2))
    torch.testing.assert_close(one, other)  # only what is nearer than what counts


def test_a_single_frame_is_made_without_time(editor, clip):
    called = []
    motion = [m for n, m in editor.unet.named_modules() if n.endswith("motion_modules.0")]
    handles = [m.proj_in.register_forward_hook(lambda *_: called.append(1)) for m in motion]
    one = edit(editor, video=clip[:1]).frames
    assert not called
    edit(editor, video=clip[:2])
    assert called
    for handle in handles:
        handle.remove()
    with temporal_layers_off(editor.unet):
        assert torch.equal(one, edit(editor, video=clip[:1]).frames)


def test_without_temporal_layers_frames_do_not_see_each_other(editor, clip):
    noise = torch.randn(1, 4, 8, 8, 8)
    depth = editor._depth(clip[None], None)  # of the whole clip: a frame alone has another range
    depth[:, :, 0, 0], depth[:, :, 0, 1] = 0, 1
    with temporal_layers_off(editor.unet):
        whole = edit(editor, depth=depth, latents=noise).frames[0]
        for frame in (0, 5):
            alone = edit(editor, depth=depth[:, frame : frame + 1], latents=noise[:, :, frame : frame + 1]).frames[0]
            torch.testing.assert_close(whole[frame], alone[0], rtol=0, atol=1e-4)


@pytest.mark.drawn(8, of="long tests")
def test_a_temporal_scale_of_one_is_the_plain_model_to_the_bit(editor, clip):
    plain = edit(editor, video=clip).frames
    with cvg.Gen1(temporal_scale=1.0).attach(editor):
        assert torch.equal(edit(editor, video=clip).frames, plain)
    with cvg.Gen1(temporal_scale=1.5).attach(editor) as run:
        assert not torch.equal(edit(editor, video=clip).frames, plain)
    assert run.guided_steps == STEPS
    assert torch.equal(edit(editor, video=clip).frames, plain)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("content", [{"prompt": "a blue square"}, {"prompt": None, "image": True}])
def test_methods_attach_to_edits_by_text_and_by_image(editor, clip, content):
    content = {name: clip[0] if value is True else value for name, value in content.items()}
    with cvg.Gen1(temporal_scale=2.0).attach(editor) as run:
        edit(editor, video=clip, **content)
    assert run.guided_steps == STEPS
    vico = cvg.Vico(words=["blue", "square"])
    if content["prompt"] is None:
        with pytest.raises(ArgumentError, match="prompt is not known"), vico.attach(editor):
            edit(editor, video=clip, **content)
    else:
        with vico.attach(editor) as run:
            edit(editor, video=clip, **content)
        assert run.guided_steps >= 1


def test_captured_maps_are_those_of_the_words(editor, clip):
    """Of the 20 keys of a layer, 16 of words and 4 of the content: against eager attention on the same inputs."""
    name, layer = next((name, module) for name, module in editor.unet.named_modules() if name.endswith("attn2"))
    inputs = []
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args[0], kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    with cvg.capture(editor, words=["square"], steps=[0]) as captured:
        edit(editor, video=clip)
    handle.remove()
    hidden, text = (each[8:] for each in inputs[0])  # the branch with content
    query, key = layer.to_q(hidden), layer.to_k(text)
    query, key = (each.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for each in (query, key))
    weights = (query @ key.mT * layer.scale).softmax(-1).mean(1)  # [F, h·w, 20]
    tokens = editor.tokenizer("a blue square").input_ids
    place = tokens.index(editor.tokenizer.convert_tokens_to_ids("square</w>"))
    block = name.removesuffix(".attn2")
    record = next(r for r in captured.records if r.layer.startswith(block) and r.branch == "cond")
    found = record.maps[0, 0].flatten(1)
    torch.testing.assert_close(found, weights[..., place].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.drawn(8, of="long tests")
def test_it_is_saved_and_loaded_as_any_pipeline(editor, clip, tmp_path):
    editor.save_pretrained(tmp_path / "plain")
    wanted = edit(editor, video=clip).frames
    loaded = cvg.StructureContentPipeline.from_pretrained(tmp_path / "plain")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.prior_scheduler is None
    for name, part in editor.components.items():
        if isinstance(part, torch.nn.Module):
            weights = loaded.components[name].state_dict()
            assert all(torch.equal(one, weights[key]) for key, one in part.state_dict().items())
    # rounding differs with where weights lie in memory
    same = {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(edit(loaded, video=clip).frames, wanted, **same)
    loaded.register_modules(prior_scheduler=build_prior_scheduler())
    sampled = edit(loaded, video=clip).frames
    assert (sampled - wanted).abs().max() > 10 * same["atol"]
    assert torch.equal(edit(loaded, video=clip).frames, sampled)
    loaded.save_pretrained(tmp_path / "diffusion")
    again = cvg.StructureContentPipeline.from_pretrained(tmp_path / "diffusion")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(edit(again, video=clip).frames, sampled, **same)


def test_the_callback_sees_each_step_and_may_change_the_latents(editor, clip):
    seen = []

    def zero(pipe, step, timestep, values):
        seen.append(step)
        return {"latents": torch.zeros_like(values["latents"])}

    made = edit(editor, video=clip, callback_on_step_end=zero, output_type="latent").frames
    assert seen == list(range(STEPS)) and not made.any()


@pytest.mark.parametrize("kind", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_other_schedulers_take_its_place(editor, clip, kind):
    import diffusers

    own = editor.scheduler
    editor.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(own.config)
    try:
        assert edit(editor, video=clip).frames.isfinite().all()
    finally:
        editor.scheduler = own


@pytest.mark.drawn(8, of="long tests")
def test_it_runs_in_bfloat16(clip):
    from tests.editing.tiny import tiny_editor

    made = edit(tiny_editor().to(torch.bfloat16), video=clip)
    assert made.frames.isfinite().all()


CLIP = torch.rand(2, 3, 64, 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"video": None}, "video or depth must be given"),
        ({"prompt": None}, "prompt or image must be given"),
        ({"structure": 8}, "structure must be a whole number from 0 to 7, got 8"),
        ({"structure": -1}, "structure must be"),
        ({"structure": True}, "structure must be"),
        ({"structure": 1.5}, "structure must be"),
        ({"output_type": "gif"}, "output_type must be one of pil, np, pt, latent"),
        ({"video": torch.rand(3, 64, 64)}, "video must be"),
        ({"video": "clip.mp4"}, "video must be"),
        ({"video": []}, "video must be"),
        ({"video": torch.rand(2, 4, 64, 64)}, "video must have 3 colour channels"),
        ({"video": 255 * torch.rand(2, 3, 64, 64)}, r"video must have numbers in \[0, 1\]"),
        ({"video": 2 * torch.rand(2, 3, 64, 64) - 1}, r"video must have numbers in \[0, 1\]"),
        ({"video": torch.full((2, 3, 64, 64), torch.nan)}, r"video must have numbers in \[0, 1\]"),
        ({"video": torch.zeros(2, 3, 64, 64, dtype=torch.long)}, "video must be bytes or numbers"),
        ({"image": 255 * torch.rand(3, 64, 64)}, r"image must have numbers in \[0, 1\]"),
        ({"video": torch.rand(33, 3, 64, 64)}, "at most 32 frames"),
        ({"image": torch.rand(4, 64, 64)}, "image must have 3 colour channels"),
        ({"prompt": ["a", "b", "c"], "video": CLIP.expand(2, 2, 3, 64, 64)}, "video must be one or one for each of 3"),
        ({"depth": torch.rand(3, 64, 64)}, "depth must have the clips and frames of video"),
        ({"depth": torch.rand(64, 64)}, "depth must be a tensor"),
        ({"depth": torch.full((2, 64, 64), torch.nan)}, "depth must be finite"),
        ({"height": 60}, "height must be a multiple of 16"),
        ({"latents": torch.randn(1, 4, 3, 8, 8)}, "latents must be"),
    ],
)
def test_what_does_not_fit_is_named(editor, change, said):
    with pytest.raises(ArgumentError, match=said):
        edit(editor, **{"video": CLIP} | change)


def test_without_a_depth_network_depth_is_asked_for(editor):
    own = editor.depth_estimator
    editor.register_modules(depth_estimator=None)
    try:
        with pytest.raises(ArgumentError, match="depth must be given"):
            edit(editor, video=CLIP)
    finally:
        editor.register_modules(depth_estimator=own)
