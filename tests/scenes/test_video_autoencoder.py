"""The transformer's autoencoder: what it takes over from that of pictures, and that frames stay apart."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL  # noqa: E402

from cvg_kernels.scenes.model import build_autoencoder  # noqa: E402
from cvg_kernels.scenes.video_autoencoder import frame_by_frame, inflate  # noqa: E402


def without_attention(model: AutoencoderKL) -> AutoencoderKL:
    for half in (model.encoder, model.decoder):
        half.mid_block.attentions[0].forward = lambda hidden, *rest, **more: hidden
    return model


@pytest.fixture
def pictures() -> AutoencoderKL:
    """Random weights, all of them: fresh norms and biases would hide what is mixed up."""
    model = build_autoencoder().eval().double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return without_attention(model)


@torch.no_grad()
def test_single_frames_are_encoded_alike(pictures):
    picture = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    found = inflate(pictures).encode(picture[:, :, None]).latent_dist
    wanted = pictures.encode(picture).latent_dist
    torch.testing.assert_close(found.mean[:, :, 0], wanted.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.logvar[:, :, 0], wanted.logvar, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_single_frames_are_decoded_alike(pictures):
    """Where no bias goes through the border's padding."""
    pictures.post_quant_conv.bias.zero_()
    latents = torch.randn(2, 4, 16, 16, dtype=torch.float64)
    found = inflate(pictures).decode(latents[:, :, None]).sample[:, :, 0]
    torch.testing.assert_close(found, pictures.decode(latents).sample, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_convolutions_of_the_last_tap_are_those_of_all(pictures):
    model = inflate(pictures)
    latents = torch.randn(1, 4, 2, 16, 16, dtype=torch.float64)
    wanted = model.decode(latents).sample
    with frame_by_frame(model):
        assert torch.allclose(model.decode(latents).sample, wanted, rtol=1e-9, atol=1e-12)
    assert torch.equal(model.decode(latents).sample, wanted)
    assert not any("forward" in vars(module) for module in model.modules())
