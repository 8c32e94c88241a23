"""Depth by any model of transformers:
larger is nearer, whatever the model gives, in the form it wants its frames in.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.editing.depth import estimate_depth, gives_distance, load_depth_model  # noqa: E402
from tests.editing.depth_models import NECK, depth_anything, ramp  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def dpt(add_projection: bool = False):
    """MiDaS' DPT, or that of DINOv2."""
    config = transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        is_hybrid=False,
        backbone_out_indices=[0, 1],
        **{**NECK, "fusion_hidden_size": 256 if add_projection else 8},
        add_projection=add_projection,
    )
    return transformers.DPTForDepthEstimation(config).eval()


def glpn():
    config = transformers.GLPNConfig(
        num_encoder_blocks=4,
        depths=[1] * 4,
        hidden_sizes=[8] * 4,
        num_attention_heads=[1] * 4,
        decoder_hidden_size=8,
        mlp_ratios=[1] * 4,
    )
    return transformers.GLPNForDepthEstimation(config).eval()


def zoedepth():
    backbone = transformers.BeitConfig(
        image_size=64,
        num_hidden_layers=4,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        out_features=[f"stage{at}" for at in range(1, 5)],
        patch_size=16,
        reshape_hidden_states=False,
        use_relative_position_bias=True,
    )
    config = transformers.ZoeDepthConfig(
        backbone_config=backbone,
        backbone_hidden_size=16,
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        bottleneck_features=8,
        num_relative_features=4,
        bin_embedding_dim=8,
        bin_configurations=[{"name": "nyu", "n_bins": 8, "min_depth": 1e-3, "max_depth": 10.0}],
        num_attractors=[4, 2, 1, 1],
    )
    return transformers.ZoeDepthForDepthEstimation(config).eval()


BUILDERS = {
    "depth_anything": depth_anything,
    "depth_anything metric": lambda: depth_anything("metric"),
    "dpt": dpt,
    "dpt of DINOv2": lambda: dpt(add_projection=True),
    "glpn": glpn,
}
DISTANCES = ("zoedepth", "depth_anything metric", "dpt of DINOv2", "glpn")


def processor(kind: str, **settings):
    """The image processor of a model, in the form that works without torchvision."""
    name = f"{kind}ImageProcessor"
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**settings)


@pytest.mark.parametrize("name", [*BUILDERS, "zoedepth"])
def test_larger_is_nearer(name):
    """A pixel that the model calls nearer than another is larger, by distances as by nearness."""
    model = zoedepth() if name == "zoedepth" else BUILDERS[name]()
    assert gives_distance(model) is (name in DISTANCES)
    sign = -1 if name in DISTANCES else 1
    frames = torch.rand(3, 3, 64, 60) * 0.4
    frames[..., 30:] += 0.5
    depth = estimate_depth(ramp(model, sign), frames)
    assert depth.shape == (3, 64, 60) and depth.dtype == torch.float32
    dark, bright = depth[..., :24].flatten(), depth[..., 36:].flatten()
    assert dark.quantile(0.95) < bright.quantile(0.05)
    turned = estimate_depth(model, frames, distance=sign > 0)
    assert turned[..., :24].median() > turned[..., 36:].median()


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", BUILDERS)
def test_what_the_network_gives(name):
    """Through the whole network, some frames at a time, and in any size; formula of distances included."""
    torch.manual_seed(3)
    model = BUILDERS[name]()
    for parameter in model.head.parameters():
        torch.nn.init.uniform_(parameter, 0, 0.5)  # ReLU: alive
    side = 56 if name.startswith("depth_anything") else 32
    frames = torch.rand(5, 3, side, side)
    with torch.no_grad():
        raw = model(pixel_values=2 * frames - 1).predicted_depth
    assert raw.shape == frames[:, 0].shape and raw.std() > 0
    wanted = 1 / raw.clamp_min(raw.max() / 100) if name in DISTANCES else raw
    for chunk in (1, 2, 8):
        found = estimate_depth(model, frames, chunk=chunk)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    odd = estimate_depth(model, torch.rand(2, 3, 45, 77))
    assert odd.shape == (2, 45, 77) and odd.isfinite().all()
    half = estimate_depth(model.bfloat16(), frames)
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_depth_pro_is_inverted_by_its_processor():
    """It gives nearness, and its processor distances."""
    model = torch.nn.Linear(1, 1)
    model.config = transformers.DepthProConfig()
    assert not gives_distance(model) and gives_distance(model, processor=object())


@pytest.mark.parametrize("kind", ["dpt", "depth_anything metric", "glpn"])
def test_by_the_processor(kind):
    """As the depth-estimation pipeline of transformers, but for the inversion of distances."""
    torch.manual_seed(4)
    model = BUILDERS[kind]()
    for parameter in model.head.parameters():
        torch.nn.init.uniform_(parameter, 0, 0.5)
    sizes = {"height": 32, "width": 32} if kind == "dpt" else {"height": 28, "width": 28}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    made = processor("GLPN") if kind == "glpn" else processor("DPT", size=sizes, **imagenet)
    frames = torch.randint(0, 256, (3, 3, 64, 96)) / 255
    pictures = [(255 * frame).byte().permute(1, 2, 0).numpy() for frame in frames]
    found = estimate_depth(model, frames, made, chunk=2)
    from PIL import Image
    from transformers.pipelines import DepthEstimationPipeline

    pipe = DepthEstimationPipeline(model=model, image_processor=made)
    pictures = [Image.fromarray(one) for one in pictures]
    raw = torch.stack([pipe(one)["predicted_depth"] for one in pictures])
    raw = raw.reshape(3, 64, 96)
    wanted = raw if kind == "dpt" else 1 / raw.clamp_min(raw.max() / 100)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(estimate_depth(model, frames), found, rtol=1e-2)
    pair = load_depth_model(pipe)
    assert pair == (model, made) and load_depth_model((model, made)) == pair
    assert load_depth_model((model, None)) == (model, None)


def test_a_saved_model(tmp_path):
    """A folder, whatever the network says; a model remembers where its processor lies."""
    model, made = dpt(), processor("DPT", size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path / "dpt")
    with pytest.raises(cvg.ArgumentError, match="depth_model .*dpt' cannot be loaded"):
        load_depth_model(tmp_path / "dpt")
    alone = transformers.DPTForDepthEstimation.from_pretrained(tmp_path / "dpt")
    with pytest.raises(cvg.ArgumentError, match="must come with its image processor.*(model, None)"):
        load_depth_model(alone)
    made.save_pretrained(tmp_path / "dpt")
    frames = torch.rand(2, 3, 40, 40)
    wanted = estimate_depth(model, frames, made)
    for source in (tmp_path / "dpt", str(tmp_path / "dpt"), alone):
        found, its_processor = load_depth_model(source)
        assert not found.training or source is alone
        torch.testing.assert_close(estimate_depth(found.eval(), frames, its_processor), wanted)


def test_what_is_no_model(tmp_path, monkeypatch):
    """A name that is not in the cache is asked for only where it may be; here it may not."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(cvg.ArgumentError, match="depth_model 'nobody/no-such-depth' cannot be loaded"):
        load_depth_model("nobody/no-such-depth")
    for source in (tmp_path / "absent", str(tmp_path / "absent"), "./absent"):
        with pytest.raises(cvg.ArgumentError, match="must be the folder of a saved model, got"):
            load_depth_model(source)
    with pytest.raises(cvg.ArgumentError, match="depth_model must be a depth model .* got int"):
        load_depth_model(3)
    with pytest.raises(cvg.ArgumentError, match=r"image processor.*DPTFor.*not loaded from anywhere"):
        load_depth_model(dpt())
    frames = torch.rand(2, 3, 32, 32)
    for wrong in (frames[0], frames[:, :1], (255 * frames).byte(), frames[:0]):
        with pytest.raises(cvg.ArgumentError, match=r"frames must be floating point \[F, 3, H, W\]"):
            estimate_depth(dpt(), wrong)
    odd = estimate_depth(zoedepth(), torch.rand(2, 3, 45, 70))
    assert odd.shape == (2, 45, 70) and odd.isfinite().all()

    def unfinished(**_):
        raise NameError("name 'tvF' is not defined")

    with pytest.raises(cvg.ArgumentError, match="processor function cannot .* torchvision: .*tvF"):
        estimate_depth(dpt(), frames, unfinished)
    with pytest.raises(cvg.ArgumentError, match="chunk must be"):
        estimate_depth(dpt(), frames, chunk=0)
    strange = ramp(dpt(), 1)
    strange.config.model_type = "somebodys"
    with pytest.raises(cvg.ArgumentError, match="distance must be given for DPTForDepthEstimation"):
        estimate_depth(strange, frames)
    assert estimate_depth(strange, frames, distance=False).shape == (2, 32, 32)
    with pytest.raises(cvg.ArgumentError, match="gave no positive distance"):
        estimate_depth(strange, frames * 0, distance=True)
    with pytest.raises(cvg.ArgumentError, match="gave infinite depth or NaN"):
        estimate_depth(strange, frames * float("nan"), distance=False)
