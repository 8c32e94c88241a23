"""Denoisers that are not in the table, and what entries of the table say that no pipeline's run shows."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402
import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.pipeline.attention import token_frames  # noqa: E402
from cvg_kernels.pipeline.layer_capture import LayerCapture  # noqa: E402
from cvg_kernels.pipeline.layers import attention_layers  # noqa: E402
from cvg_kernels.pipeline.models import LEFT_OUT, MODELS, arguments_of, model_by_range  # noqa: E402
from tests.pipelines import PIPELINES, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

#: Pipeline → the keys of its text, and the grid of its video.
NAMED = {
    "wan": (slice(0, 14), (3, 2, 2)),
    "cogvideox": (slice(0, 16), None),
    "hunyuan_video": (slice(-16, None), (3, 2, 4)),
    "latte": (slice(0, 18), None),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_denoiser_that_is_not_in_the_table_is_captured_by_range(name, monkeypatch):
    case = PIPELINES[name]
    pipe, options = case.build()
    with cvg.capture(pipe, ["cat"]) as known:
        stock = run(pipe, options)
    text, grid = NAMED[name]
    if grid is None:
        grid = known.records[0].grid
        text = slice(0, _text_of(pipe, options))
    monkeypatch.delitem(MODELS, case.denoiser)
    with cvg.capture(pipe, ["cat"], text=text, grid=grid) as named:
        torch.testing.assert_close(run(pipe, options), stock, rtol=1e-4, atol=1e-4)
    assert len(named.records) == len(known.records) > 0
    for one, other in zip(named.records, known.records, strict=True):
        assert (one.layer, one.step, one.branch) == (other.layer, other.step, other.branch)
        torch.testing.assert_close(one.maps, other.maps)
    with pytest.raises(cvg.ArgumentError, match=r"capture must be told .*text=slice"):
        cvg.capture(pipe, ["cat"]).__enter__()


def _text_of(pipe, options) -> int:
    """How many tokens of text its denoiser is given."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    run(pipe, options)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "text must be the range of the keys .* of WanTransformer3DModel"),
        ({"text": slice(0, 14, 2)}, "text must be the range"),
        ({"text": slice(3, 3)}, "text must be the range"),
        ({"grid": None}, "grid must be the frames, rows and columns"),
        ({"grid": (3, 2)}, r"grid must be .*, got \(3, 2\)"),
        ({"grid": (3, 2, 0)}, "grid must be"),
        ({"temporal": True}, "temporal must be False where text and grid are named"),
    ],
)
def test_what_is_missing_is_said(changes, message, monkeypatch):
    pipe, _ = PIPELINES["wan"].build()
    monkeypatch.delitem(MODELS, "WanTransformer3DModel")
    given = {"text": slice(0, 14), "grid": (3, 2, 2), **changes}
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.capture(pipe, ["cat"], **given).__enter__()
    assert not any(name.startswith("_cvg") for name in vars(pipe.transformer))


def test_layers_that_attend_sample_by_sample_are_refused(monkeypatch):
    pipe, options = PIPELINES["mochi"].build()
    monkeypatch.delitem(MODELS, "MochiTransformer3DModel")
    with (
        pytest.raises(cvg.ArgumentError, match="attends with 1 samples at a time, and the call has"),
        cvg.capture(pipe, ["cat"], text=slice(-8, None), grid=(2, 2, 2)),
    ):
        run(pipe, options)


def test_ranges_that_no_layer_has(monkeypatch):
    pipe, options = PIPELINES["wan"].build()
    with pytest.raises(cvg.ArgumentError, match="text and grid must be None .* which is known"):
        cvg.capture(pipe, ["cat"], text=slice(0, 14), grid=(3, 2, 2)).__enter__()
    monkeypatch.delitem(MODELS, "WanTransformer3DModel")
    with (
        pytest.warns(cvg.GuidanceWarning, match="no layer has the keys"),
        cvg.capture(pipe, ["cat"], text=slice(0, 14), grid=(5, 5, 5)),
    ):
        run(pipe, options)
    with pytest.raises(cvg.ArgumentError, match="must take its latents as one of"):
        model_by_range(torch.nn.Linear(2, 2), slice(0, 14), (3, 2, 2))


def test_every_video_transformer_is_known_or_left_out():
    """Of the installed diffusers: classes of transformers whose name tells that they make videos."""
    there = {
        name
        for name in dir(diffusers)
        if "Transformer3D" in name or name in ("UNetMotionModel", "UNet3DConditionModel")
    }
    assert there
    assert there <= MODELS.keys() | LEFT_OUT.keys() | {"Transformer3DModel"} | _IMAGES
    for name, reason in LEFT_OUT.items():
        assert reason and name not in MODELS


#: Video by their name only.
_IMAGES = {"JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"}


def test_entries_name_arguments_that_there_are():
    for name, model in MODELS.items():
        kind = getattr(diffusers, name, None)
        if kind is None:  # of another release
            continue
        parameters = inspect.signature(kind.forward).parameters
        assert model.latents in parameters and "encoder_hidden_states" in parameters


def test_frames_of_tokens_before_a_text():
    found = token_frames((2, 1, 2), 7, torch.device("cpu"), 1)
    assert found.tolist() == [-1, 0, 0, 1, 1, -1, -1]


#: Their texts are masked, trimmed or sorted: pipeline → arguments that hold one entry for each token of a text.
MASKED = {
    "hunyuan_video": ("encoder_attention_mask",),
    "framepack": ("encoder_attention_mask",),
    "hunyuan_video15": ("encoder_attention_mask", "encoder_attention_mask_2"),
    "mochi": ("encoder_attention_mask",),
    "motif_video": ("encoder_attention_mask",),
    "ltx": ("encoder_attention_mask",),
    "allegro": ("encoder_attention_mask",),
    "sana_video": ("encoder_attention_mask",),
}


def first_call(pipe, options) -> dict:
    """The arguments of a pipeline's first call of its denoiser, one sample."""
    seen = []

    def note(module, args, kwargs):
        seen.append(arguments_of(module, args, kwargs))

    hook = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    run(pipe, options)
    hook.remove()
    batch = seen[0]["encoder_hidden_states"].shape[0]
    return {
        name: value[-1:] if torch.is_tensor(value) and len(value) == batch else value
        for name, value in seen[0].items()
    }


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", MASKED)
def test_texts_of_several_lengths_in_a_batch(name):
    """Maps of every token of two texts, one shorter, are those of each alone, where models trim otherwise or not at
    all.
    """
    pipe, options = PIPELINES[name].build()
    one = first_call(pipe, options)
    other = {key: torch.randn_like(value) if key == "encoder_hidden_states" else value for key, value in one.items()}
    tokens = one["encoder_hidden_states"].shape[-2]
    for number, mask in enumerate(MASKED[name]):
        one[mask], other[mask] = (torch.zeros_like(one[mask]) for _ in range(2))
        one[mask][:, : 5 - 2 * number] = 1
        other[mask][:, : 3 - 2 * number] = 1
    shared = MODELS[PIPELINES[name].denoiser].shared
    both = {
        key: torch.cat([value, other[key]]) if torch.is_tensor(value) and key not in shared else value
        for key, value in one.items()
    }
    layers = [layer.name for layer in attention_layers(pipe.transformer) if layer.kind == "cross"]

    def maps(arguments, samples):
        ids = torch.arange(tokens).expand(samples, -1)
        with torch.no_grad(), LayerCapture(pipe.transformer, ids, layers) as capture:
            return capture.run(lambda: pipe.transformer(**arguments))

    found = maps(both, 2)
    assert set(found) == set(layers)
    for sample, alone in enumerate((one, other)):
        for layer, wanted in maps(alone, 1).items():
            assert wanted[:, 0].min() > 0 and not wanted[:, 5:].any()
            torch.testing.assert_close(found[layer][sample], wanted[0], rtol=1e-4, atol=1e-6)


def test_texts_by_frame_are_refused_where_an_image_stands_with_the_text():
    pipe, _ = PIPELINES["i2vgenxl"].build()
    with pytest.raises(cvg.ArgumentError, match="prompts must be None for I2VGenXLUNet"):
        cvg.VSTAR(sigma=None, prompts=["a red cat", "a blue dog"]).attach(pipe)
    cvg.VSTAR(sigma=1.0).attach(pipe)


def test_vstar_needs_attention_among_frames():
    pipe, _ = PIPELINES["sana_video"].build()
    with pytest.raises(cvg.ArgumentError, match="softmax attention .* SanaVideoTransformer3DModel"):
        cvg.VSTAR().attach(pipe)
