"""docs/gen1.md: its snippets run, on tiny networks in the place of the checkpoints, with every argument they name."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402
import diffusers.utils  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import control_inputs  # noqa: E402
from tests.docs.pages import ROOT, blocks  # noqa: E402
from tests.editing.depth_models import depth_anything  # noqa: E402
from tests.editing.tiny import tiny_editor  # noqa: E402
from tests.pipelines import PIPELINES  # noqa: E402
from tests.pipelines.parts import clip_of, clip_processor, clip_vision, image  # noqa: E402
from tests.pipelines.unets import ip_adapter_weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SNIPPETS = blocks((ROOT / "docs" / "gen1.md").read_text(encoding="utf-8"), "python")
TINY = {
    "AnimateDiffControlNetPipeline": "animatediff_controlnet",
    "AnimateDiffVideoToVideoControlNetPipeline": "animatediff_v2v_controlnet",
    "AnimateDiffSparseControlNetPipeline": "animatediff_sparsectrl",
    "WanVACEPipeline": "wan_vace",
}
#: Sizes that a test has time for.
SMALLER = {"512": "32", "480": "32", "832": "48", "[:81]": "[:9]", "steps=25": "steps=3"}


def pipeline_from_pretrained(cls, name, **parts):
    """The tiny pipeline of a class, if it takes what it is loaded with."""
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    accepted = {*inspect.signature(cls.__init__).parameters, "torch_dtype"}
    assert set(parts) <= accepted
    return PIPELINES[TINY[cls.__name__]].build()[0]


def load_ip_adapter(pipe, name, *, subfolder, weight_name):
    assert (name, subfolder, weight_name) == ("h94/IP-Adapter", "models", "ip-adapter_sd15.bin")
    pipe.register_modules(image_encoder=clip_vision(8), feature_extractor=clip_processor())
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])


@pytest.mark.drawn(7)
@pytest.mark.parametrize("at", range(len(SNIPPETS)))
def test_a_snippet_runs(at, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    image(20, 30).save("reference.png")
    clip = clip_of(56, 40, 16)
    exported, called = [], []
    patch = monkeypatch.setattr
    if "load_editor" in SNIPPETS[at]:
        editor = tiny_editor()
        patch(cvg.shapes, "load_editor", lambda: editor, raising=False)
    patch(diffusers.DiffusionPipeline, "from_pretrained", classmethod(pipeline_from_pretrained))
    patch(diffusers.ModelMixin, "from_pretrained", classmethod(lambda cls, *_, **__: cls))
    patch(diffusers.DiffusionPipeline, "to", lambda pipe, device: pipe)
    patch(diffusers.loaders.IPAdapterMixin, "load_ip_adapter", load_ip_adapter)
    patch(diffusers.utils, "load_video", lambda path: clip)
    patch(diffusers.utils, "export_to_gif", lambda frames, path: exported.append(frames))

    def load_depth_model(source, device):
        assert source in ("Intel/dpt-large", "depth-anything/Depth-Anything-V2-Small-hf")
        called.append(source)
        return depth_anything(), None

    patch(control_inputs, "load_depth_model", load_depth_model)
    snippet = SNIPPETS[at]
    for given, less in SMALLER.items():
        snippet = snippet.replace(given, less)
    space = {"cvg": cvg, "clip": clip[:8]}
    if "pipe =" not in snippet:  # the one that is the same everywhere
        pipe, _ = PIPELINES["animatediff_controlnet"].build()
        named = {"subfolder": "models", "weight_name": "ip-adapter_sd15.bin"}
        load_ip_adapter(pipe, "h94/IP-Adapter", **named)
        space |= {"pipe": pipe, "prompt": "a red cat"}
    exec(compile(snippet, f"docs/gen1.md, snippet {at}", "exec"), space)
    frames = space["frames"]
    assert len(frames) == (9 if "Wan" in snippet else 8 if "load_video" not in snippet else 16)
    assert called or "load_editor" in snippet
    assert bool(exported) == ("export_to_gif" in snippet)
    assert torch.is_tensor(frames) or len({str(getattr(f, "size", None)) for f in frames}) == 1
