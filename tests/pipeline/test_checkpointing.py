"""`checkpointing=True`: the same guidance with less kept for the backward pass, and a denoiser as it was."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import Guidance  # noqa: E402
from cvg_kernels.pipeline.checkpointing import checkpointed  # noqa: E402
from tests.pipeline.field import WORDS, tree  # noqa: E402
from tests.pipelines import PIPELINES, denoisers, run  # noqa: E402
from tests.roundings import assert_equal_but_for_roundings, moves  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["animatediff", "latte", "wan", "cogvideox", "ltx", "hunyuan_video"]


def vico(checkpointing):
    return cvg.Vico(words=WORDS, iterations=2, stop=0.5, checkpointing=checkpointing)


def flags(pipe):
    """How each module is set, and by what."""
    return [
        (module.gradient_checkpointing, vars(module).get("_gradient_checkpointing_func", "none"))
        for denoiser in denoisers(pipe)
        for module in denoiser.modules()
        if hasattr(module, "gradient_checkpointing")
    ]


def guided(pipe, options, method):
    with method.attach(pipe) as made, cvg.capture(pipe, words=WORDS) as captured:
        frames = run(pipe, options)
    losses = [entry[key] for entry in made.history for key in ("loss", "gradient_norm")]
    assert losses
    return [frames, *losses, *(record.maps for record in captured.records)]


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", NAMES)
def test_the_guidance_is_the_same(name):
    """Also the record: the layers that run again are recorded once, and the pipeline's own calls run as ever."""
    pipe, options = PIPELINES[name].build()
    options["num_inference_steps"] = 2
    want = guided(pipe, options, vico(False))
    before, things = flags(pipe), tree(pipe)
    calls = []
    layer = next(
        module
        for name, module in denoisers(pipe)[0].named_modules()
        if name.endswith("to_q") and "blocks" in name and "refiner" not in name
    )
    hook = layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    guided(pipe, options, vico(False))
    plain = sum(calls)
    calls.clear()
    got = guided(pipe, options, vico(True))
    assert sum(calls) == 2 * plain > 0  # computed once more, in the backward pass
    hook.remove()
    moved = moves(lambda: guided(pipe, options, vico(False)), denoisers(pipe))
    assert_equal_but_for_roundings(got, want, moved)
    assert flags(pipe) == before and tree(pipe) == things


class Saving(Guidance):
    """Counts the bytes that a forward pass of the denoiser keeps for its backward pass."""

    def before_step(self, call, run):
        z, kept = call.latents.detach().requires_grad_(), {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call.denoise(z)[0]
        run.history.append(sum(kept.values()))
        return z + torch.autograd.grad(output.square().mean(), z)[0]


@pytest.mark.parametrize("name", ["animatediff", "wan", "cogvideox"])
def test_less_is_kept(name):
    """Also of a method of one's own; the moved video is the same."""
    pipe, options = PIPELINES[name].build()
    options["num_inference_steps"] = 1
    kept = []

    def video(checkpointing=False):
        with Saving(checkpointing=checkpointing).attach(pipe) as made:
            frames = run(pipe, options)
        kept.extend(made.history)
        return [frames]

    want, got = video(), video(checkpointing=True)
    assert kept[1] < kept[0] / 2, kept
    assert_equal_but_for_roundings(got, want, moves(video, denoisers(pipe)))


def test_what_somebody_has_set_stays():
    pipe, options = PIPELINES["wan"].build()
    pipe.transformer.enable_gradient_checkpointing()
    before = flags(pipe)
    want = guided(pipe, options, vico(False))
    torch.testing.assert_close(guided(pipe, options, vico(True)), want)
    assert flags(pipe) == before and pipe.transformer.is_gradient_checkpointing


def test_an_exception_leaves_nothing():
    pipe, _ = PIPELINES["animatediff"].build()
    before = flags(pipe)
    with pytest.raises(ZeroDivisionError), checkpointed(pipe.unet):
        assert pipe.unet.is_gradient_checkpointing
        raise ZeroDivisionError
    assert flags(pipe) == before


@pytest.mark.parametrize("how", ["blocks", "leaves", "cast"])
def test_with_weights_that_come_and_go(how):
    """Group offloading and layer-wise casting bring them again for the second forward."""
    pipe, options = PIPELINES["wan"].build()
    options["num_inference_steps"] = 2
    here = torch.device("cpu")
    moved = moves(lambda: guided(pipe, options, vico(False)), denoisers(pipe))
    if how == "cast":
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    else:
        level = {"blocks": "block_level", "leaves": "leaf_level"}[how]
        number = {"num_blocks_per_group": 1} if how == "blocks" else {}
        pipe.transformer.enable_group_offload(here, here, level, **number)
    want = guided(pipe, options, vico(False))
    assert_equal_but_for_roundings(guided(pipe, options, vico(True)), want, moved)


def test_what_cannot_be_is_refused():
    with pytest.raises(cvg.ArgumentError, match="checkpointing must be True or False, got 1"):
        cvg.Vico(checkpointing=1)
    with pytest.raises(cvg.ArgumentError, match="for methods that move the latents.*VSTAR"):
        cvg.VSTAR(checkpointing=True)
    pipe, _ = PIPELINES["modelscope"].build()
    with pytest.raises(cvg.ArgumentError, match="which UNet3DConditionModel has not"):
        vico(True).attach(pipe)
