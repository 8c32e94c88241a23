"""Maps attached to the graph: right gradients, replayed layers recorded once, an early end."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.pipeline.layer_capture import LayerCapture  # noqa: E402
from cvg_kernels.pipeline.layers import attention_layers, temporal_partners  # noqa: E402
from cvg_kernels.pipeline.models import denoisers_of  # noqa: E402
from tests.differences import assert_gradient  # noqa: E402
from tests.offline_pipelines import PROMPT, TOKENS, animatediff, cogvideox, noise, wan  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def unet_call(pipe, latents):
    """A denoiser call as the pipeline makes it, without classifier-free guidance."""
    text, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    return lambda: pipe.unet(latents, 500, encoder_hidden_states=text.repeat_interleave(4, 0))


def cross_names(pipe):
    return [layer.name for layer in attention_layers(denoisers_of(pipe)[0]) if layer.kind == "cross"]


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_layer_capture_is_differentiable(checkpointing):
    """The gradient on the latents is that of finite differences, with and without replayed layers."""
    pipe, _ = animatediff()
    pipe.unet.double().requires_grad_(False)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.unet.train()
    layers = attention_layers(pipe.unet)
    cross = [layer for layer in layers if layer.kind == "cross"][:2]
    temporal = [partner.name for layer in cross for partner in temporal_partners(layers, layer)]
    ids = torch.tensor([[3, 7]])
    weights = None

    def loss(z):
        nonlocal weights
        maps = capture.run(lambda: call_with(z))
        assert set(maps) == {layer.name for layer in cross} | set(temporal)
        if weights is None:
            weights = {name: torch.randn_like(tensor) for name, tensor in maps.items()}
        return sum((maps[name] * weights[name]).sum() for name in maps)

    text, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    text = text.detach().double().repeat_interleave(4, 0)

    def call_with(z):
        return pipe.unet(z, 500, encoder_hidden_states=text)

    with LayerCapture(pipe.unet, ids, [layer.name for layer in cross], temporal) as capture:
        z = torch.randn(1, 4, 4, 5, 7, dtype=torch.float64, requires_grad=True)
        assert_gradient(loss, z, torch.autograd.grad(loss(z), z)[0])


def test_a_replayed_layer_is_recorded_once():
    pipe, _ = animatediff()
    pipe.unet.requires_grad_(False)
    latents = torch.randn(1, 4, 4, 5, 7, requires_grad=True)
    found = {}
    for checkpointing in (False, True):
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
            pipe.unet.train()
        with cvg.capture(pipe, words=["cat"], prompt=PROMPT, gradients=True) as captured:
            output = unet_call(pipe, latents)().sample
            loss = output.square().sum() + sum(record.maps.square().sum() for record in captured.records)
            (gradient,) = torch.autograd.grad(loss, latents)
        found[checkpointing] = (len(captured.records), gradient)
    assert found[True][0] == found[False][0] == len(cross_names(pipe))
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-4, atol=1e-6)


@pytest.mark.drawn(8, of="long tests")
def test_a_replayed_joint_layer_is_recorded_once():
    """CogVideoX: the gradient of maps and prediction on its latents, with and without checkpointing,
    by differences.
    """
    pipe, _ = cogvideox()
    pipe.transformer.double().requires_grad_(False)
    latents = noise("cogvideox", pipe, 1).double()
    rotary = pipe._prepare_rotary_positional_embeddings(16, 24, 3, torch.device("cpu"))

    def loss(z):
        with cvg.capture(pipe, words=["cat"], prompt=PROMPT, gradients=True) as captured:
            text, _ = pipe.encode_prompt(PROMPT, max_sequence_length=TOKENS)
            output = pipe.transformer(
                hidden_states=z,
                encoder_hidden_states=text.detach().double(),
                timestep=torch.tensor([500]),
                image_rotary_emb=rotary,
            ).sample
            total = output.square().sum()
            total = total + sum((10 * record.maps).square().sum() for record in captured.records)
            gradient = torch.autograd.grad(total, z)[0] if z.requires_grad else None
        assert len(captured.records) == 2
        return total, gradient

    gradients = [loss(latents.clone().requires_grad_())[1]]
    pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.train()
    gradients.append(loss(latents.clone().requires_grad_())[1])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert_gradient(lambda z: loss(z)[0], latents, gradients[0])


def test_layer_capture_ends_early_and_checks():
    pipe, _ = animatediff()
    latents = torch.randn(1, 4, 4, 5, 7)
    ran = []
    hook = pipe.unet.conv_out.register_forward_hook(lambda *_: ran.append(True))
    first = cross_names(pipe)[0]
    for stop, reached in ((True, []), (False, [True])):
        ran.clear()
        with LayerCapture(pipe.unet, torch.tensor([[3]]), [first], stop_after_last=stop) as capture:
            maps = capture.run(unet_call(pipe, latents))
        assert ran == reached and set(maps) == {first}
    hook.remove()
    with pytest.raises(cvg.ArgumentError, match="'nowhere' is no cross layer; these are: down_blocks"):
        LayerCapture(pipe.unet, torch.tensor([[3]]), ["nowhere"])


def test_layer_capture_refuses_a_cache():
    from diffusers import FirstBlockCacheConfig

    pipe, _ = wan()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(cvg.ArgumentError, match="has a cache enabled"):
        LayerCapture(pipe.transformer, torch.tensor([[3]]), cross_names(pipe))
