"""The prior of the editor: from the embedding of a caption to that of a frame which it describes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, PriorTransformer
from torch.nn.functional import mse_loss
from transformers import CLIPModel

from cvg_kernels.editing.content import embed_texts
from cvg_kernels.shapes.edit_latents import load_edit_clips
from cvg_kernels.shapes.files import save_model
from cvg_kernels.shapes.train_content import CONTENT_WIDTH
from cvg_kernels.training.fit import fit

_BATCH = 256
_RATE = 1e-3


def build_prior() -> PriorTransformer:
    """A prior transformer of 0.4 M parameters, for either kind."""
    return PriorTransformer(
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=2,
        embedding_dim=CONTENT_WIDTH,
        num_embeddings=0,
        encoder_hid_proj_type=None,
    )


def build_prior_scheduler() -> DDIMScheduler:
    """The noise schedule of a diffusion prior, as unCLIP's: cosine, predicting the clean embedding."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )


class _Pairs:
    """Embeddings of captions and of frames that they describe."""

    def __init__(self, folder: Path, encoder: CLIPModel) -> None:
        clips = load_edit_clips(folder / "edit-clips")
        self.images = clips.embeddings.float()
        with torch.no_grad():
            texts = [embed_texts(encoder, part) for part in clips.tokens.flatten(0, 1).split(4096)]
        self.texts = torch.cat(texts).unflatten(0, (-1, 2))

    def draw(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts and images `[256, D]`, with numbers of variance 1."""
        chosen = torch.from_numpy(rng.integers(len(self.images), size=_BATCH))
        frame = torch.from_numpy(rng.integers(self.images.shape[1], size=_BATCH))
        kind = torch.from_numpy(rng.integers(2, size=_BATCH))
        scale = CONTENT_WIDTH**0.5
        return scale * self.texts[chosen, kind], scale * self.images[chosen, frame]


def train_prior(
    folder: Path, encoder: CLIPModel, *, seed: int, steps: int, device: torch.device, diffusion: bool = False
) -> PriorTransformer:
    """Trains a prior on the clips of `encode_edit_clips` and saves it to `folder/prior` or `folder/diffusion-prior`.

    Loss: ‖p_θ(0, 0, text) − image‖² of a regression; ‖p_θ(√ᾱ image + √(1 − ᾱ) ε, t, text) − image‖² of a diffusion
        model.

    Args:
        folder: the run's folder.
        encoder: the trained content encoder.
        seed: random seed of the run.
        steps: number of optimiser steps.
        device: where to train.
        diffusion: whether the prior is a diffusion model.
    """
    torch.manual_seed(seed)
    pairs, schedule = _Pairs(folder, encoder), build_prior_scheduler()
    model = build_prior().to(device)

    def loss(model: PriorTransformer, rng: np.random.Generator) -> torch.Tensor:
        texts, images = (each.to(device) for each in pairs.draw(rng))
        if diffusion:
            timesteps = torch.randint(1000, (len(images),), device=device)
            noisy = schedule.add_noise(images, torch.randn_like(images), timesteps)
        else:
            timesteps, noisy = 0, torch.zeros_like(images)
        return mse_loss(model(noisy, timesteps, texts).predicted_image_embedding, images)

    name = "diffusion-prior" if diffusion else "prior"
    model = fit(folder, name, model, loss, steps=steps, seed=seed, rate=_RATE, decay=0.99)
    save_model(model.eval().to("cpu"), folder / name)
    return model
