"""Gen-1's structure and content on the pipelines that take them: what arrives at the networks, and what is refused."""

from __future__ import annotations

import contextlib
import re

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402
from PIL import Image  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.editing.depth import estimate_depth  # noqa: E402
from cvg_kernels.editing.structure import structure_maps  # noqa: E402
from cvg_kernels.guidance import structure_frames  # noqa: E402
from cvg_kernels.guidance.methods import method_named  # noqa: E402
from tests.editing.depth_models import depth_anything, ramp  # noqa: E402
from tests.editing.tiny import tiny_editor  # noqa: E402
from tests.offline_pipelines import run  # noqa: E402
from tests.pipelines import PIPELINES  # noqa: E402
from tests.pipelines.parts import clip_processor, clip_vision, image  # noqa: E402
from tests.pipelines.unets import _ip_adapter_weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CONTROLLED = ["animatediff_controlnet", "animatediff_v2v_controlnet", "animatediff_sparsectrl", "wan_vace"]
OURS = ("video", "mask", "conditioning_frames", "controlnet_frame_indices", "num_frames")


def build(name: str):
    """A tiny pipeline whose control does something, and the arguments that are not for Gen-1 to make."""
    pipe, options = PIPELINES[name].build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name == "wan_vace":
            for block in pipe.transformer.vace_blocks:
                torch.nn.init.normal_(block.proj_out.weight, std=0.2)
        elif name != "animatediff":
            _awaken(pipe.controlnet)
    options = {key: value for key, value in options.items() if key not in OURS}
    strength = {"wan_vace": "conditioning_scale", "animatediff": None}
    strength = strength.get(name, "controlnet_conditioning_scale")
    return pipe, options if strength is None else {**options, strength: 3.0}


def _awaken(controlnet) -> None:
    """Weights that carry a change of the control to the other end; those at the ends are zero before any training."""
    for module in controlnet.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)


def clip_for(name: str, options) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip and its depth, of the size that the pipeline is called with."""
    frames = 9 if name == "wan_vace" else 4
    size = (options.pop("height"), options.pop("width"))
    blocks = torch.rand(frames, size[0] // 4, size[1] // 4) * 7 - 3
    depth = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return torch.rand(frames, 3, *size), depth


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


@pytest.mark.drawn(2)
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


def with_adapter(name: str):
    """A tiny pipeline of AnimateDiff with an IP-Adapter."""
    pipe, options = build(name)
    parts = {**pipe.components, "image_encoder": clip_vision(8)}
    parts["feature_extractor"] = clip_processor()
    pipe = type(pipe)(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet._load_ip_adapter_weights([_ip_adapter_weights(pipe.unet)])
    return pipe, options


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", ["animatediff", *CONTROLLED[:3]])
@pytest.mark.drawn(2)
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


def test_what_pipelines_cannot_take():
    plain, _ = PIPELINES["animatediff"].build()
    wan, _ = PIPELINES["wan"].build()
    controlled, _ = PIPELINES["animatediff_controlnet"].build()
    depth = torch.rand(4, 40, 56)
    acts = (lambda gen1, pipe: gen1.attach(pipe), lambda gen1, pipe: gen1.inputs(pipe, depth=depth))
    for act in acts:
        said = "structure must be None on AnimateDiffPipeline.*: Structure.*, WanVACEPipeline"
        with pytest.raises(cvg.ArgumentError, match=said):
            act(cvg.Gen1(structure=3), plain)
        with pytest.raises(cvg.ArgumentError, match="content must be None on WanPipeline.*those"):
            act(cvg.Gen1(content=image(8, 8)), wan)
        with pytest.raises(cvg.ArgumentError, match=r"with no IP-Adapters.*load_ip_adapter"):
            act(cvg.Gen1(structure=1, content=image(8, 8)), controlled)
    parts = {**controlled.components, "controlnet": [controlled.controlnet] * 2}
    for name in ("feature_extractor", "image_encoder"):
        parts.pop(name)
    controlled = type(controlled)(**parts)
    with pytest.raises(cvg.ArgumentError, match="several ControlNets"):
        cvg.Gen1(structure=1).attach(controlled)
    with pytest.raises(cvg.ArgumentError, match="structure or content must be given"):
        cvg.Gen1().inputs(controlled, depth=depth)
    adapted, _ = with_adapter("animatediff")
    with pytest.raises(cvg.ArgumentError, match="video and depth must be None without structure"):
        cvg.Gen1(content=image(8, 8)).inputs(adapted, depth=depth)
    adapted.image_encoder = None
    with pytest.raises(cvg.ArgumentError, match="without an image_encoder"):
        cvg.Gen1(content=image(8, 8)).attach(adapted)


@pytest.mark.parametrize("name", ["animatediff_controlnet", "wan_vace"])
def test_a_call_without_the_inputs(name):
    pipe, options = build(name)
    _, depth = clip_for(name, options)
    gen1 = cvg.Gen1(structure=3)
    argument = "video" if name == "wan_vace" else "conditioning_frames"
    before = type(pipe)
    with gen1.attach(pipe):
        said = f"{argument} must be given .* structure=3 is .*gen1.inputs"
        with pytest.raises(cvg.ArgumentError, match=said):
            run(pipe, options)
        run(pipe, options, **gen1.inputs(pipe, depth=depth))
    assert type(pipe) is before


@pytest.mark.parametrize("distances", [False, True])
def test_depth_is_estimated(distances, tmp_path):
    """Of the frames as the pipeline gets them; what is nearer is whiter, whether the model gives nearness or
    distances.
    """
    pipe, _ = build("animatediff_v2v_controlnet")
    model = depth_anything("metric" if distances else "relative")
    ramp(model, -1 if distances else 1)
    frames = torch.rand(4, 3, 60, 90) * 0.4
    frames[..., 45:] += 0.5
    gen1 = cvg.Gen1(structure=1)
    sizes = {"height": 56, "width": 56}
    inputs = gen1.inputs(pipe, video=frames, depth_model=(model, None), **sizes)
    shown = torch.tensor(np.stack([np.asarray(one) for one in inputs["video"]])) / 255
    estimate = estimate_depth(model, shown.permute(0, 3, 1, 2))
    grey, wanted = (
        torch.tensor(np.stack([np.asarray(one) for one in made])).float()
        for made in (inputs["conditioning_frames"], structure_frames(estimate, 1))
    )
    assert (grey - wanted).abs().max() <= 8  # the frames were rounded to bytes before
    assert grey[:, :, :24].mean() + 50 < grey[:, :, 32:].mean()
    turned = gen1.inputs(pipe, video=frames, depth_model=(model, None), distance=not distances)
    grey = np.stack([np.asarray(one) for one in turned["conditioning_frames"]]).astype(float)
    assert grey[:, :, :40].mean() > grey[:, :, 50:].mean() + 20
    with pytest.raises(cvg.ArgumentError, match="depth or depth_model must be given for AnimateDiff"):
        gen1.inputs(pipe, video=frames)
    with pytest.raises(cvg.ArgumentError, match="depth and depth_model must not be given both"):
        gen1.inputs(pipe, video=frames, depth=estimate, depth_model=(model, None))
    with pytest.raises(cvg.ArgumentError, match="depth_model must be the folder of a saved model"):
        gen1.inputs(pipe, video=frames, depth_model=tmp_path / "absent")


def test_sizes():
    """The clip's own size in eighths, or one that is asked for; nothing is squeezed."""
    pipe, options = build("animatediff_controlnet")
    gen1 = cvg.Gen1(structure=0)
    depth = torch.rand(4, 45, 61)
    inputs = gen1.inputs(pipe, depth=depth)
    assert (inputs["height"], inputs["width"]) == (40, 56)
    # A step in the middle of the columns stays there; the rest is cut on both sides alike.
    step = (torch.arange(208) >= 104).float().expand(4, 80, 208)
    inputs = gen1.inputs(pipe, depth=step, height=40, width=40)
    grey = np.asarray(inputs["conditioning_frames"][0])[..., 0]
    assert grey.shape == (40, 40) and (grey[:, :18] == 0).all() and (grey[:, 22:] == 255).all()
    assert gen1.inputs(pipe, depth=step, height=40)["width"] == 104
    assert gen1.inputs(pipe, depth=step, width=40)["height"] == 16
    options = {name: value for name, value in options.items() if name not in ("height", "width")}
    clip = run(pipe, options, **gen1.inputs(pipe, depth=step, height=40))
    assert tuple(clip.shape[-2:]) == (40, 104)
    for given, said in (
        ({"height": 41}, "height must be a multiple of 8, got 41"),
        ({"width": 0}, "width must be a multiple of 8, got 0"),
        ({"depth": torch.rand(4, 7, 30)}, "video must be at least 8 x 8 pixels"),
        ({"video": torch.rand(3, 3, 80, 208)}, "depth must have the 3 frames of video, got 4"),
        ({"video": torch.rand(4, 3, 80, 100)}, "aspect ratio of video, 80 x 100, got 80 x 208"),
        ({"depth": torch.rand(33, 16, 16)}, r"at most 32 frames .* got 33 \(pipe.enable_free_noise"),
    ):
        with pytest.raises(cvg.ArgumentError, match=said):
            gen1.inputs(pipe, **{"depth": step, **given})
    small = gen1.inputs(pipe, depth=step[:, ::2, ::2], video=torch.rand(4, 3, 80, 208))
    assert (small["height"], small["width"]) == (80, 208)
    wan, _ = build("wan_vace")
    said = r"4 n \+ 1 frames for WanVACEPipeline, got 8: cut it to 5, or go on to 9"
    with pytest.raises(cvg.ArgumentError, match=said):
        gen1.inputs(wan, depth=torch.rand(8, 32, 32))


def test_videos_in_any_form():
    pipe, _ = build("animatediff_v2v_controlnet")
    bytes_ = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    array = bytes_.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(frame) for frame in array]
    depth = torch.rand(4, 16, 24)
    gen1 = cvg.Gen1(structure=1)
    for video in (bytes_, bytes_ / 255, array, array / 255, list(array), pictures, tuple(bytes_)):
        assert gen1.inputs(pipe, video=video, depth=depth)["video"] == pictures
    grey = [Image.fromarray(one.numpy()) for one in depth]
    for form in (depth.numpy(), list(depth.numpy()), depth.double(), grey):
        made = gen1.inputs(pipe, video=pictures, depth=form)["conditioning_frames"]
        assert made == structure_frames(depth, 1)
    for video, said in (
        ([], "at least one frame"),
        ([pictures[0], pictures[0].resize((8, 8))], r"of one size, got \[\(8, 8\), \(16, 24\)\]"),
        (bytes_[None], "video must be one clip.*got Tensor"),
        ([pictures], "video must hold images.*got list"),
        (bytes_.float(), r"video must have floating point numbers in \[0, 1\]"),
        (bytes_[:, :1], r"video must hold images.*got Tensor \(1, 16, 24\)"),
        ("clip.mp4", "video must be one clip.*got str"),
    ):
        with pytest.raises(cvg.ArgumentError, match=said):
            gen1.inputs(pipe, video=video, depth=depth)
    for wrong, said in (
        (depth[None], r"\[F, H, W\] of one clip, got \(1, 4, 16, 24\)"),
        (depth * float("nan"), "depth must be finite"),
        ("depth", "depth must be a tensor"),
        ([pictures[0].convert("L"), pictures[0].convert("L").resize((8, 8))], "maps of one size"),
    ):
        with pytest.raises(cvg.ArgumentError, match=said):
            gen1.inputs(pipe, video=pictures, depth=wrong)


def test_content_in_any_form(tmp_path):
    picture = image(12, 10, 5)
    picture.save(tmp_path / "reference.png")
    array = np.array(picture)
    tensor = torch.tensor(array).permute(2, 0, 1)
    path = tmp_path / "reference.png"
    for content in (picture, path, str(path), array, tensor, tensor / 255, [picture]):
        assert cvg.Gen1(content=content).content == (picture,)
    assert cvg.Gen1(content=torch.stack([tensor, tensor])).content == (picture, picture)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert cvg.Gen1(content=clear).content[0].getpixel((0, 0)) == (255, 255, 255)
    assert hash(cvg.Gen1(content=picture)) and cvg.Gen1(content=picture) != cvg.Gen1(content=clear)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for content, said in (
        ([], "at least one image"),
        (tmp_path / "absent.png", "content .*absent.png' cannot be read"),
        (tmp_path / "broken.png", "content .*broken.png' cannot be read"),
        (3, "content must hold images.*got int"),
    ):
        with pytest.raises(cvg.ArgumentError, match=said):
            cvg.Gen1(content=content)
    for level in (-1, 8, 1.5, True, "3"):
        with pytest.raises(cvg.ArgumentError, match="structure must be a whole number from 0 to 7"):
            cvg.Gen1(structure=level)
    with pytest.raises(cvg.ArgumentError, match="takes option=value with the options") as refused:
        method_named("gen1:structure=3")
    assert not re.search(r"\bcontent\b", str(refused.value))
