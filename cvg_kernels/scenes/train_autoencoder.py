"""The autoencoder of the world of scenes, and its decoder once more alone, for which the latents stay as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from cvg_kernels.scenes.captions import random_caption, random_clip
from cvg_kernels.scenes.model import build_autoencoder
from cvg_kernels.scenes.world import render
from cvg_kernels.shapes.files import load_model, save_model
from cvg_kernels.shapes.model import fold_latent_scale
from cvg_kernels.training.fit import fit

_KL_WEIGHT = 1e-3
_BATCH = 16
_OFF = 0.05  # deviation of the noise on latents of variance 1 that the decoder learns to bear


def random_pictures(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Single frames of fresh clips, `[count, 3, H, W]` in [-1, 1]."""
    clips = [random_clip(rng, random_caption(rng), frames=1, noisy=True) for _ in range(count)]
    return render(clips)[:, 0] * 2 - 1


def train_autoencoder(folder: Path, *, seed: int, steps: int, device: torch.device) -> AutoencoderKL:
    """Trains the autoencoder on single frames and folds the latents' mean and deviation into it.

    Loss: |x − D(E(x))| + (x − D(E(x)))² + 1e-3 · KL(E(x) ‖ N(0, 1)), each a mean over elements.

    Args:
        folder: the run's folder; holds the checkpoint while training and the result in `autoencoder/`.
        seed: random seed of initialisation and data; a resumed run sees the data it would have seen.
        steps: number of optimiser steps.
        device: where to train.
    """

    def loss(model: AutoencoderKL, rng: np.random.Generator) -> torch.Tensor:
        pictures = random_pictures(rng, _BATCH).to(device)
        posterior = model.encode(pictures).latent_dist
        error = model.decode(posterior.sample()).sample - pictures
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + error.square().mean() + _KL_WEIGHT * kl

    torch.manual_seed(seed)
    model = build_autoencoder().to(device, memory_format=torch.channels_last)
    fit(folder, "autoencoder", model, loss, steps=steps, seed=seed, rate=2e-3, weight_decay=1e-4)
    model.eval()
    with torch.no_grad():
        pictures = random_pictures(np.random.default_rng((seed, 2)), 512).to(device)
        latents = torch.cat([model.encode(part).latent_dist.mean for part in pictures.split(64)])
    fold_latent_scale(model, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    save_model(model.to("cpu"), folder / "autoencoder")
    return model


def train_decoder(folder: Path, *, seed: int, steps: int, device: torch.device) -> None:
    """Trains the decoder on: it learns to draw sharply from latents that stay as they are, a little off as denoised
    ones.

    Loss: |x − D(E(x) + 0.05 ε)| + (…)², mean over elements, on single frames.

    Args:
        folder: the run's folder, with `autoencoder/`; the result is in `vae/`.
        seed: random seed of data and noise.
        steps: number of optimiser steps.
        device: where to train.
    """
    model = load_model(AutoencoderKL, folder / "autoencoder").to(device, memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)

    def loss(model: AutoencoderKL, rng: np.random.Generator) -> torch.Tensor:
        pictures = random_pictures(rng, _BATCH).to(device)
        with torch.no_grad():
            latents = model.encode(pictures).latent_dist.mean
        error = model.decode(latents + _OFF * torch.randn_like(latents)).sample - pictures
        return error.abs().mean() + error.square().mean()

    fit(folder, "decoder", model, loss, steps=steps, seed=seed, rate=1e-3, weight_decay=0.0)
    save_model(model.to("cpu"), folder / "vae")
