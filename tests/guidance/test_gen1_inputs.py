"""Gen-1's structure and content on the pipelines that take them: what arrives at the networks."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.editing.structure import structure_maps  # noqa: E402
from cvg_kernels.guidance import structure_frames  # noqa: E402
from tests.editing.tiny import tiny_editor  # noqa: E402
from tests.guidance.gen1_pipelines import CONTROLLED, build, clip_for, with_adapter  # noqa: E402
from tests.offline_pipelines import run  # noqa: E402
from tests.pipelines import PIPELINES  # noqa: E402
from tests.pipelines.parts import image  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@contextlib.contextmanager
def control_seen(pipe):
    """The control that reaches the network, call by call."""
    seen = []
    wan = isinstance(pipe, diffusers.WanVACEPipeline)
    network = pipe.transformer if wan else pipe.controlnet
    name = "control_hidden_states" if wan else "controlnet_cond"

    def note(_, args, kwargs):
        seen.append(kwargs[name].clone())

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", CONTROLLED)
def test_a_level_is_what_the_network_sees(name):
    """Another level is another control and another clip; the same level is the same to the bit."""
    pipe, options = build(name)
    frames, depth = clip_for(name, options)
    clips, controls = {}, {}
    for level in (0, 2, 5, 2):
        gen1 = cvg.Gen1(structure=level)
        assert gen1.temporal_scale == 1
        with control_seen(pipe) as seen, gen1.attach(pipe):
            clip = run(pipe, options, **gen1.inputs(pipe, video=frames, depth=depth))
        assert seen and all(torch.equal(one, seen[0]) for one in seen)
        if level in clips:
            assert torch.equal(clip, clips[level]) and torch.equal(seen[0], controls[level])
        clips[level], controls[level] = clip, seen[0]
    for one, other in ((0, 2), (2, 5), (0, 5)):
        assert not torch.equal(clips[one], clips[other])
        assert (controls[one] - controls[other]).abs().max() > 0.05
    assert tuple(clips[0].shape[-2:]) == tuple(depth.shape[-2:])
    if name != "wan_vace":  # which encodes it
        wanted = structure_maps(depth[None], 5)[0][:, None].expand(-1, 3, -1, -1)
        given = controls[5]
        given = given[0].transpose(0, 1) if given.ndim == 5 else given[: len(depth)]
        torch.testing.assert_close(given, wanted, rtol=0, atol=0.5001 / 255)


@pytest.mark.parametrize("name", CONTROLLED)
def test_without_video_and_the_frames_asked_for(name):
    """Depth alone does, but where the pipeline starts from the clip."""
    pipe, options = build(name)
    frames, depth = clip_for(name, options)
    gen1 = cvg.Gen1(structure=1)
    both = gen1.inputs(pipe, video=frames, depth=depth)
    if name == "animatediff_v2v_controlnet":
        with pytest.raises(cvg.ArgumentError, match="video must be given for AnimateDiffVideoTo"):
            gen1.inputs(pipe, depth=depth)
        assert len(both["video"]) == 4 and "num_frames" not in both
        shown = np.stack([np.asarray(frame) for frame in both["video"]]) / 255
        torch.testing.assert_close(torch.tensor(shown).permute(0, 3, 1, 2).float(), frames, rtol=0, atol=0.5001 / 255)
        return
    assert gen1.inputs(pipe, depth=depth) == both
    assert both["num_frames"] == len(depth)
    wanted = structure_frames(depth, 1)
    assert both["video" if name == "wan_vace" else "conditioning_frames"] == wanted
    if name == "animatediff_sparsectrl":
        some = gen1.inputs(pipe, depth=depth, frame_indices=[3, 0])
        assert some["conditioning_frames"] == [wanted[3], wanted[0]]
        with control_seen(pipe) as seen:
            run(pipe, options, **some)
        told = [bool(frame.any()) for frame in seen[0][0].transpose(0, 1)]
        assert told == [True, False, False, True]
        for indices in ([4], [], [0, 0], [-1], [True]):
            with pytest.raises(cvg.ArgumentError, match="frame_indices must"):
                gen1.inputs(pipe, depth=depth, frame_indices=indices)
    else:
        with pytest.raises(cvg.ArgumentError, match="frame_indices must be None on"):
            gen1.inputs(pipe, depth=depth, frame_indices=[0])


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", CONTROLLED)
def test_vico_beside(name):
    """Words are captured and moved beside the control."""
    pipe, options = build(name)
    frames, depth = clip_for(name, options)
    gen1 = cvg.Gen1(structure=2)
    vico = cvg.Vico(["cat", "dog"], stop=0.5, iterations=1, step_size=0.05)
    inputs = gen1.inputs(pipe, video=frames, depth=depth)
    with gen1.attach(pipe):
        alone = run(pipe, options, **inputs)
    with cvg.Together((gen1, vico)).attach(pipe) as made:
        both = run(pipe, options, **inputs)
    assert made.guided_steps and not torch.equal(both, alone)
    with cvg.capture(pipe, words=["cat"]) as captured:
        seen = run(pipe, options, **inputs)
    torch.testing.assert_close(seen, alone, rtol=1e-3, atol=1e-3)
    assert captured.records


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", ["animatediff", *CONTROLLED[:3]])
@pytest.mark.drawn(6)
def test_content_by_an_adapter(name, images):
    pipe, options = with_adapter(name)
    first, other = ([image(40, 30, seed + at) for at in range(images)] for seed in (0, 10))
    given = {}
    structure = None if name == "animatediff" else 2
    if structure is not None:
        frames, depth = clip_for(name, options)
        given = {"video": frames, "depth": depth}
    clips, seen = [], []
    projection = pipe.unet.encoder_hid_proj
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    for content in (first, other, first):
        gen1 = cvg.Gen1(structure=structure, content=content if images > 1 else content[0])
        with gen1.attach(pipe):
            clips.append(run(pipe, options, **gen1.inputs(pipe, **given)))
    hook.remove()
    assert torch.equal(clips[0], clips[2])
    assert not torch.equal(clips[0], clips[1])
    assert seen[0].shape[1] == images
    pixels = pipe.feature_extractor(first, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = pipe.image_encoder(pixels).image_embeds
    torch.testing.assert_close(seen[0][-1], wanted)


def test_content_of_vace():
    pipe, options = build("wan_vace")
    _, depth = clip_for("wan_vace", options)
    clips = {}
    images = [image(20, 30, 1), image(9, 9, 2)]
    for name, content in (("none", None), ("one", images[:1]), ("two", images)):
        gen1 = cvg.Gen1(structure=2, content=content)
        inputs = gen1.inputs(pipe, depth=depth)
        assert len(inputs.get("reference_images", ())) == len(content or ())
        with gen1.attach(pipe):
            clips[name] = run(pipe, options, **inputs)
        assert clips[name].shape[1] == 9
    assert not torch.equal(clips["none"], clips["one"])
    assert not torch.equal(clips["one"], clips["two"])
    alone = cvg.Gen1(content=image(20, 30, 1))
    assert set(alone.inputs(pipe)) == {"reference_images"}


@pytest.mark.drawn(8, of="long tests")
def test_our_own_pipeline():
    pipe = tiny_editor()
    frames, reference = torch.rand(4, 3, 64, 64), image(64, 64, 3)
    gen1 = cvg.Gen1(temporal_scale=1.5, structure=4, content=reference)
    options = {"num_inference_steps": 2}
    with gen1.attach(pipe) as made:
        ours = run(pipe, options, **gen1.inputs(pipe, video=frames))
    assert made.guided_steps == 2
    plain = cvg.Gen1(temporal_scale=1.5)
    with plain.attach(pipe):
        same = run(pipe, options, video=frames, structure=4, image=reference)
        other = run(pipe, options, video=frames, structure=3, image=reference)
    assert torch.equal(ours, same) and not torch.equal(ours, other)
    depth = torch.rand(4, 64, 64)
    inputs = gen1.inputs(pipe, depth=depth)
    assert set(inputs) == {"depth", "structure", "image"} and torch.equal(inputs["depth"], depth)
    estimated = gen1.inputs(pipe, video=frames, depth_model=(pipe.depth_estimator, None))
    with plain.attach(pipe):
        torch.testing.assert_close(run(pipe, options, **estimated), ours, rtol=1e-4, atol=1e-4)
    with gen1.attach(pipe):
        with pytest.raises(cvg.ArgumentError, match="structure must be .* attached, 4, got 3"):
            run(pipe, options, **{**inputs, "structure": 3})
        with pytest.raises(cvg.ArgumentError, match="image must be given .* Gen1 with content"):
            run(pipe, options, depth=depth, structure=4)
        run(pipe, options, **inputs)
    with pytest.raises(cvg.ArgumentError, match="content must be one image for Structure.* got 2"):
        cvg.Gen1(structure=1, content=[reference] * 2).inputs(pipe, video=frames)
    with pytest.raises(cvg.ArgumentError, match="video or depth must be given"):
        gen1.inputs(pipe)


def test_the_temporal_scale_beside():
    """It works where there are temporal layers, and says where not; there the other dials work alone."""
    pipe, options = build("animatediff_controlnet")
    frames, depth = clip_for("animatediff_controlnet", options)
    clips = []
    for scale in (1, 2.0):
        gen1 = cvg.Gen1(temporal_scale=scale, structure=3)
        with gen1.attach(pipe) as made:
            clips.append(run(pipe, options, **gen1.inputs(pipe, depth=depth)))
        assert made.guided_steps == (0 if scale == 1 else 3)
    assert not torch.equal(*clips)
    wan, _ = PIPELINES["wan_vace"].build()
    said = "WanVACE.*; without them temporal_scale must be 1, not 1.5"
    with pytest.raises(cvg.ArgumentError, match=said):
        cvg.Gen1(temporal_scale=1.5, structure=3).attach(wan)
    assert cvg.Gen1().temporal_scale == 1.5 and cvg.Gen1(structure=0).temporal_scale == 1
