"""VSTAR on networks without temporal layers:
the band, by the distance of frames, on attention over the whole video.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import diagonality  # noqa: E402
from cvg_kernels.pipeline.layers import attention_layers  # noqa: E402
from tests.offline_pipelines import BUILDERS, LATENTS, TOKENS, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
#: Times that the denoiser is called in a step, and the text tokens in its attention.
SPANNING = {"wan": (2, 0), "cogvideox": (1, TOKENS)}


def noted_calls(monkeypatch):
    """The arguments of every banded attention from now on."""
    calls = []

    def noting(*args, **band):
        calls.append((args, band))
        return cvg.frame_band_attention(*args, **band)

    monkeypatch.setattr("cvg_kernels.pipeline.attention.frame_band_attention", noting)
    return calls


@pytest.mark.parametrize("name", SPANNING)
def test_without_a_band_it_is_stock(name):
    pipe, options = BUILDERS[name]()
    stock = run(pipe, options)
    for off in (cvg.VSTAR(sigma=None), cvg.VSTAR(strength=0.0), cvg.VSTAR(stop=0.0)):
        with off.attach(pipe):
            assert torch.equal(run(pipe, options), stock)


@pytest.mark.parametrize("name", SPANNING)
def test_with_a_band_it_is_another_video_and_stock_again(name):
    pipe, options = BUILDERS[name]()
    layers = attention_layers(pipe.transformer)
    before = [layer.module.processor for layer in layers]
    stock = run(pipe, options)
    results = []
    for backend in ("auto", "reference"):
        with cvg.trace_backends() as ran, cvg.VSTAR(stop=0.3, strength=2.0, backend=backend).attach(pipe):
            results.append(run(pipe, options))
        # Two layers in the first of three steps.
        chosen = "native" if backend == "auto" else "reference"
        assert ran == [("frame_band_attention", chosen)] * 2 * SPANNING[name][0]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(results[0], stock, atol=1e-4)

    def stop(*_):
        raise RuntimeError("stop")

    hook = pipe.transformer.norm_out.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"), cvg.VSTAR().attach(pipe):
        run(pipe, options)
    hook.remove()
    after = [layer.module.processor for layer in layers]
    assert all(one is other for one, other in zip(after, before, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())
    assert torch.equal(run(pipe, options), stock)


@pytest.mark.parametrize("name", SPANNING)
def test_the_band_makes_it_attend_to_near_frames(name, monkeypatch):
    """The attention from frame to frame, by the definition,
    lies more along the diagonal with the band than without.
    """
    pipe, options = BUILDERS[name]()
    calls_of_a_step, text = SPANNING[name]
    frames, rows, columns = LATENTS[name]
    places = [frame for frame in range(frames) for _ in range(rows * columns // 4)]
    calls = noted_calls(monkeypatch)
    with cvg.VSTAR(sigma=0.5, stop=1.0).attach(pipe):
        run(pipe, options)
    assert len(calls) == 6 * calls_of_a_step

    def score(query, key, value, query_frames, key_frames, **band):
        assert query_frames.tolist() == [-1] * text + places
        one_hot = torch.eye(frames + 1)[query_frames.long()][:, :frames]  # −1 is the last: no frame
        frame_of_key, frame_of_query = one_hot.expand(*key.shape[:2], -1, -1), one_hot
        maps = cvg.frame_band_attention(
            query, key, frame_of_key, query_frames, key_frames, **band | {"backend": "reference"}
        ).out
        maps = frame_of_query.T @ maps  # [B, H, 3, 3]
        return diagonality(maps / maps.sum(-1, keepdim=True)).mean()

    for args, band in calls:
        assert score(*args, **band) > score(*args, **band | {"strength": 0.0}) + 0.01


@pytest.mark.parametrize("name", SPANNING)
def test_guidance_goes_through_the_band(name):
    """Vico within VSTAR: the gradient passes the banded layers, and is the reference's, checkpointing or not."""
    norms = []
    for backend, checkpointing in (("auto", False), ("auto", True), ("reference", False)):
        pipe, options = BUILDERS[name]()
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        vico = cvg.Vico(["cat", "dog"], iterations=1, stop=0.1, backend=backend)
        with cvg.trace_backends() as ran, cvg.VSTAR(backend=backend).attach(pipe), vico.attach(pipe) as made:
            run(pipe, options)
        assert (("frame_band_attention_backward", "native") in ran) == (backend == "auto")
        norms.append(made.history[0]["gradient_norm"])
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(norms[0], norms[2], rtol=1e-4, atol=0)


def test_joint_attention_is_captured_with_its_band(monkeypatch):
    """In CogVideoX capture and the band meet in one layer:
    the maps are those of the banded attention, and it stays.
    """
    pipe, options = BUILDERS["cogvideox"]()
    calls = noted_calls(monkeypatch)
    with cvg.VSTAR(sigma=0.5, strength=2.0).attach(pipe):
        banded = run(pipe, options)
        with cvg.processors(pipe):
            torch.testing.assert_close(run(pipe, options), banded, rtol=1e-4, atol=1e-4)
        with cvg.capture(pipe, words=["cat"]) as mean:
            torch.testing.assert_close(run(pipe, options), banded, rtol=1e-4, atol=1e-4)
        with cvg.capture(pipe, words=["cat"], head_reduction="none") as captured:
            run(pipe, options)
    # Those of the first run, which nobody captured: the attention of all runs is the same.
    torch.testing.assert_close(mean.heat_map("cat"), captured.heat_map("cat"))
    (query, key, value, *frames), band = calls[0]
    is_cat = torch.eye(key.shape[2])[3, :, None].expand(*key.shape[:3], 1)
    maps = cvg.frame_band_attention(query, key, is_cat, *frames, **band | {"backend": "reference"})
    maps = maps.out[:, :, TOKENS:].reshape(2, query.shape[1], 1, 3, 2, 3)  # [B, H, K, F, h, w]
    for record, wanted in zip(captured.records[:2], maps, strict=True):
        assert record.step == 0
        torch.testing.assert_close(record.maps[0], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("option", [{"prompts": ["a", "b"]}, {"trained_frames": 8}])
@pytest.mark.parametrize("name", SPANNING)
def test_it_takes_the_band_alone(name, option):
    pipe, _ = BUILDERS[name]()
    (given,) = option
    with pytest.raises(cvg.ArgumentError, match=f"{given} must be None for .*Transformer3DModel"):
        cvg.VSTAR(**option).attach(pipe)
