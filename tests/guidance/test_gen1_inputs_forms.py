"""What Gen-1 is given for structure and content: depth, sizes, videos and images in any form; what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.editing.depth import estimate_depth  # noqa: E402
from cvg_kernels.guidance import structure_frames  # noqa: E402
from cvg_kernels.guidance.methods import method_named  # noqa: E402
from tests.editing.depth_models import depth_anything, ramp  # noqa: E402
from tests.guidance.gen1_pipelines import build, clip_for, with_adapter  # noqa: E402
from tests.offline_pipelines import run  # noqa: E402
from tests.pipelines import PIPELINES  # noqa: E402
from tests.pipelines.parts import image  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.drawn(8, of="long tests")
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
