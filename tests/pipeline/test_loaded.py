"""What is loaded into a pipeline and how it is laid out: LoRA, tiles of the autoencoder, layers on several devices."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.field import WORDS  # noqa: E402
from tests.pipelines import PIPELINES, SAME, denoisers, in_float64, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VICO = cvg.Vico(words=WORDS, stop=0.5, iterations=1)


def results(pipe, options):
    """The video under Vico, its losses and maps, and the video under the swap."""
    with VICO.attach(pipe) as made, cvg.capture(pipe, words=WORDS) as captured:
        frames = run(pipe, options, num_inference_steps=2)
    assert made.guided == [(0, 0)]
    with cvg.processors(pipe):
        swapped = run(pipe, options, num_inference_steps=2)
    losses = [entry["loss"] for entry in made.history]
    return [frames, swapped, *losses, *(record.maps for record in captured.records)]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", ["animatediff", "wan", "cogvideox"])
def test_lora_loaded_fused_unfused_and_gone(name):
    """Loaded, fused and unfused are one model; switched off and deleted the model is that without.

    In float64: weights of an adapter are added to others, or to what they give, and guidance amplifies the difference.
    """
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe, options = in_float64(PIPELINES[name].build())
    plain = results(pipe, options)
    network = denoisers(pipe)[0]
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    network.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    network.double()
    loaded = results(pipe, options)
    assert (loaded[0] - plain[0]).abs().max() > 1000 * SAME["atol"]
    stock = run(pipe, options, num_inference_steps=2)
    torch.testing.assert_close(loaded[1], stock, **SAME)
    network.fuse_lora()
    torch.testing.assert_close(results(pipe, options), loaded, **SAME)
    network.unfuse_lora()
    torch.testing.assert_close(results(pipe, options), loaded, **SAME)
    network.disable_lora()
    torch.testing.assert_close(results(pipe, options), plain, **SAME)
    network.enable_lora()
    network.delete_adapters("default")
    torch.testing.assert_close(results(pipe, options), plain, **SAME)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_tiles_of_the_autoencoder(name):
    """Only the decoding is in tiles: maps, losses and latents are the same, the video is that of the tiles."""
    pipe, options = PIPELINES[name].build()
    latent = {**options, "output_type": "latent"}
    want = results(pipe, latent)
    pipe.vae.enable_tiling()
    torch.testing.assert_close(results(pipe, latent), want)
    stock = run(pipe, options, num_inference_steps=2)
    with cvg.processors(pipe):
        torch.testing.assert_close(run(pipe, options, num_inference_steps=2), stock, rtol=1e-4, atol=1e-4)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", ["animatediff", "wan"])
def test_layers_on_several_devices(name, tmp_path):
    """A `device_map` with every second part on disk: accelerate brings its weights for each forward."""
    pipe, options = PIPELINES[name].build()
    want = results(pipe, options)
    network = denoisers(pipe)[0]
    parts = [part for part, module in network.named_children() if list(module.parameters())]
    places = {part: ("cpu", "disk")[at % 2] for at, part in enumerate(parts)}
    own = [key for key, _ in network.named_parameters(recurse=False)]
    places |= dict.fromkeys([*own, *(key for key, _ in network.named_buffers(recurse=False))], "cpu")
    accelerate.dispatch_model(network, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    away = [key for key, parameter in network.named_parameters() if parameter.is_meta]
    assert away and len(away) < len(list(network.parameters()))
    torch.testing.assert_close(results(pipe, options), want)
    assert away == [key for key, parameter in network.named_parameters() if parameter.is_meta]
