"""First stage of the shapes model: the image autoencoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from cvg_kernels.shapes.files import save_model
from cvg_kernels.shapes.model import build_autoencoder, fold_latent_scale
from cvg_kernels.shapes.world import random_scene, render
from cvg_kernels.training.checkpoint import Checkpoint
from cvg_kernels.training.log import TrainingLog

_KL_WEIGHT = 1e-3
_BATCH = 24
_LEARNING_RATE = 2e-3


def _frames(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Single frames of fresh scenes, `[count, 3, H, W]` in [-1, 1]."""
    return render([random_scene(rng, frames=1) for _ in range(count)])[:, 0] * 2 - 1


def train_autoencoder(folder: Path, *, seed: int, steps: int, device: torch.device) -> AutoencoderKL:
    """Trains the autoencoder on single frames and folds the latents' mean and deviation into it.

    Loss: |x − D(E(x))| + (x − D(E(x)))² + 1e-3 · KL(E(x) ‖ N(0, 1)), each a mean over elements.

    Args:
        folder: the run's folder; holds the checkpoint while training and the result in `vae/`.
        seed: random seed of initialisation and data; a resumed run sees the data it would have seen.
        steps: number of optimiser steps.
        device: where to train.
    """
    torch.manual_seed(seed)
    model = build_autoencoder().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    checkpoint = Checkpoint(folder / "autoencoder.safetensors", model=model, optimizer=optimizer, schedule=schedule)

    first = checkpoint.resume()
    with TrainingLog(folder, "autoencoder", first, steps) as log:
        for step in range(first, steps):
            torch.manual_seed(seed * 1_000_003 + step)  # the noise of the reparametrisation
            frames = _frames(np.random.default_rng((seed, 1, step)), _BATCH).to(device)
            posterior = model.encode(frames).latent_dist
            error = model.decode(posterior.sample()).sample - frames
            kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
            loss = error.abs().mean() + error.square().mean() + _KL_WEIGHT * kl
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            log.step(loss)
            checkpoint.save_sometimes(step + 1)

    model.eval()
    with torch.no_grad():
        rng = np.random.default_rng((seed, 2))
        latents = model.encode(_frames(rng, 512).to(device)).latent_dist.mean
    fold_latent_scale(model, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    save_model(model.to("cpu"), folder / "vae")
    return model
