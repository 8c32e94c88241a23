"""The transformer's autoencoder: the UNet's, put into CogVideoX's class and trained on until both agree on latents.

CogVideoX's pipeline wants an autoencoder of video. Made from that of pictures it has the same latents, so the
transformer can learn from those that the UNet was trained on. It keeps every frame, and each from its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from torch import nn

from cvg_kernels.blocks import block
from cvg_kernels.scenes.captions import random_caption, random_clip
from cvg_kernels.scenes.world import SIZE, render
from cvg_kernels.shapes.files import load_model, save_model
from cvg_kernels.training.fit import fit

_BATCH = 8
_FRAMES = 2  # as many as CogVideoX's decoder takes at a time; its norms look at all of them together
_OFF = 0.05  # as for the UNet's decoder


@torch.no_grad()
def inflate(pictures: AutoencoderKL) -> AutoencoderKLCogVideoX:
    """Puts the weights of an autoencoder of pictures into one of video, which treats each frame alike.

    A convolution over time has the weights in its last tap and zeros before. The norms of the decoder, which CogVideoX
    lets look at the latents, do not look. The 1×1 convolutions between encoder and decoder become part of their
    neighbours. What has no place is left out: the attention in the middle.

    Args:
        pictures: with 4 latent channels.
    """
    config = pictures.config
    made = AutoencoderKLCogVideoX(
        block_out_channels=config.block_out_channels,
        down_block_types=("CogVideoXDownBlock3D",) * len(config.block_out_channels),
        up_block_types=("CogVideoXUpBlock3D",) * len(config.block_out_channels),
        latent_channels=config.latent_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        sample_height=SIZE,
        sample_width=SIZE,
        temporal_compression_ratio=1,
        scaling_factor=config.scaling_factor,
    ).to(pictures.dtype)
    given = _without_1x1(pictures)
    weights = {name: _from_pictures(name, like, given) for name, like in made.state_dict().items()}
    made.load_state_dict(weights)
    return made.eval()


def _without_1x1(pictures: AutoencoderKL) -> dict[str, torch.Tensor]:
    """Its weights, those of `quant_conv` and `post_quant_conv` multiplied into their neighbours."""
    given = dict(pictures.state_dict())
    encode, decode = given["quant_conv.weight"][:, :, 0, 0], given["post_quant_conv.weight"][:, :, 0, 0]
    weight, bias = given["encoder.conv_out.weight"], given["encoder.conv_out.bias"]
    given["encoder.conv_out.weight"] = torch.einsum("oc,cihw->oihw", encode, weight)
    given["encoder.conv_out.bias"] = encode @ bias + given["quant_conv.bias"]
    weight, bias = given["decoder.conv_in.weight"], given["decoder.conv_in.bias"]
    given["decoder.conv_in.weight"] = torch.einsum("oihw,ic->ochw", weight, decode)
    # exact but for the outermost latents, beyond which a picture is padded with zeros
    given["decoder.conv_in.bias"] = bias + weight.sum((2, 3)) @ given["post_quant_conv.bias"]
    return given


def _from_pictures(name: str, like: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight of that name in the autoencoder of video."""
    if ".conv_y." in name or ".conv_b." in name:  # y · norm(x) + b, from the latents: 1 and 0 for all of them
        return torch.full_like(like, float(".conv_y." in name and name.endswith("bias")))
    name = name.replace(".norm_layer.", ".").replace("norm_out", "conv_norm_out")
    if not name.endswith(("samplers.0.conv.weight", "samplers.0.conv.bias")):
        name = name.replace(".conv.", ".")
    found = given[name]
    if like.ndim > found.ndim:
        taps = torch.zeros_like(like)
        taps[:, :, -1] = found
        return taps
    return found


@block
def frame_by_frame(model: AutoencoderKLCogVideoX) -> Iterator[None]:
    """Lets convolutions over time use their last tap alone, as ones of pictures: the others stay as they are."""
    convolutions = [one for one in model.modules() if isinstance(one, CogVideoXCausalConv3d)]
    for one in convolutions:
        one.forward = functools.partial(_of_last_tap, one)
    try:
        yield
    finally:
        for one in convolutions:
            del one.forward


def _of_last_tap(causal: CogVideoXCausalConv3d, inputs: torch.Tensor, conv_cache: torch.Tensor | None = None):
    """What the convolution gives where the taps before the last are zero, and nothing to keep for later frames."""
    found = nn.functional.conv2d(
        inputs.transpose(1, 2).flatten(0, 1), causal.conv.weight[:, :, -1], causal.conv.bias, padding="same"
    )
    return found.unflatten(0, (len(inputs), -1)).transpose(1, 2), None


def train_video_autoencoder(folder: Path, *, seed: int, steps: int, device: torch.device) -> None:
    """Trains the inflated autoencoder until it has the latents and the pictures of the UNet's.

    Loss: (E(x) − z)² + |x − D(z + 0.05 ε)| + (…)², each a mean over elements, z the latents of the UNet's autoencoder,
    on neighbouring frames of clips.

    Args:
        folder: the run's folder, with `vae/`; the result is in `video_vae/`.
        seed: random seed of data and noise.
        steps: number of optimiser steps.
        device: where to train.
    """
    teacher = load_model(AutoencoderKL, folder / "vae").to(device)
    model = inflate(teacher).to(device)

    def loss(model: AutoencoderKLCogVideoX, rng: np.random.Generator) -> torch.Tensor:
        frames = _neighbours(rng, _BATCH).to(device)  # [B, 3, F, H, W]
        with torch.no_grad():
            latents = teacher.encode(frames.transpose(1, 2).flatten(0, 1)).latent_dist.mean
            latents = latents.unflatten(0, (_BATCH, _FRAMES)).transpose(1, 2)
        encoded = model.encode(frames).latent_dist.mean
        error = model.decode(latents + _OFF * torch.randn_like(latents)).sample - frames
        return (encoded - latents).square().mean() + error.abs().mean() + error.square().mean()

    with frame_by_frame(model):
        fit(folder, "video_vae", model, loss, steps=steps, seed=seed, rate=1e-3, weight_decay=0.0)
    save_model(model.to("cpu"), folder / "video_vae")


def _neighbours(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Two neighbouring frames of fresh clips, `[count, 3, 2, H, W]` in [-1, 1]."""
    clips = [random_clip(rng, random_caption(rng), noisy=True) for _ in range(count)]
    first = rng.integers(clips[0][0].centres.shape[0] - _FRAMES + 1, size=count)
    video = render(clips) * 2 - 1
    cut = torch.stack([clip[at : at + _FRAMES] for clip, at in zip(video, first, strict=True)])
    return cut.transpose(1, 2)
