"""The denoiser of the world of scenes, on pictures first and then on clips, with its text encoder.

Pictures come first because the spatial layers, which see the words, then learn objects from independent pictures; the
motion modules are added to the trained image model, as AnimateDiff does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from cvg_kernels.scenes.model import build_image_denoiser, build_motion_adapter, build_text_encoder
from cvg_kernels.shapes.files import load_model, save_model, save_text_encoder
from cvg_kernels.shapes.latents import load_shards, tokenize
from cvg_kernels.shapes.model import build_scheduler
from cvg_kernels.shapes.train_denoiser import TextToLatents
from cvg_kernels.training.fit import fit

_CAPTION_DROPOUT = 0.1  # the share of captions replaced by "", for classifier-free guidance
_AGAIN = 0.6  # share of the learning rate for pictures that are trained on
_NOISE_POWER = 0.6  # timesteps are 1000 · u^power: what is shown, and where, is decided while there is much noise


@dataclass(frozen=True)
class Stage:
    """What tells the image stage and the video stage apart."""

    name: Literal["images", "video"]
    samples: int  # per process and step
    rate: float  # of the layers of the image model
    motion_rate: float  # of the motion modules
    decay: float  # of the moving average of the weights


IMAGES = Stage("images", 48, rate=2e-3, motion_rate=2e-3, decay=0.998)
VIDEO = Stage("video", 8, rate=6e-4, motion_rate=2e-3, decay=0.996)


def _start(stage: Stage, before: Path | None, tokenizer: CLIPTokenizer) -> TextToLatents:
    """The networks training begins with: fresh ones, or an image model, which clips add motion modules to."""
    if before is None:
        return TextToLatents(build_text_encoder(tokenizer), build_image_denoiser())
    text_encoder = load_model(CLIPTextModel, before / "text_encoder")
    images = load_model(UNet2DConditionModel, before / "unet")
    if stage.name == "images":
        return TextToLatents(text_encoder, images)
    return TextToLatents(text_encoder, UNetMotionModel.from_unet2d(images, build_motion_adapter()))


def velocity_loss(
    samples: int, latents: torch.Tensor, tokens: torch.Tensor, no_caption: torch.Tensor, device: torch.device
) -> Callable[[nn.Module, np.random.Generator], torch.Tensor]:
    """Makes the loss that denoisers are trained with, ‖v_θ(α_t z + σ_t ε, t, c) − (α_t ε − σ_t z)‖², mean over
    elements.

    Args:
        samples: drawn for a step.
        latents: `[N, C, h, w]` or `[N, C, F, h, w]`, all of them.
        tokens: `[N, MAX_TOKENS]`, their captions.
        no_caption: `[1, MAX_TOKENS]`, what stands for a tenth of the captions, for classifier-free guidance.
        device: where the network is.
    """
    noise_schedule = build_scheduler()

    def loss(predict: nn.Module, rng: np.random.Generator) -> torch.Tensor:
        chosen = torch.from_numpy(rng.integers(len(latents), size=samples))
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape)
        timesteps = (1000 * torch.rand(len(chosen)) ** _NOISE_POWER).long()
        dropped = torch.rand(chosen.shape) < _CAPTION_DROPOUT
        words = torch.where(dropped[:, None], no_caption, tokens[chosen])
        noisy = noise_schedule.add_noise(clean, noise, timesteps)
        target = noise_schedule.get_velocity(clean, noise, timesteps)
        prediction = predict(noisy.to(device), timesteps.to(device), words.to(device))
        return nn.functional.mse_loss(prediction, target.to(device))

    return loss


def train_denoiser(
    folder: Path,
    tokenizer: CLIPTokenizer,
    stage: Stage,
    *,
    name: str,
    before: Path | None,
    seed: int,
    steps: int,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Trains one cycle of a stage with v-prediction and saves its moving average to
    `folder/<name>/{unet,text_encoder}`; the loss is `velocity_loss`.

    Args:
        folder: the run's folder, with `latents-<name>/` made before.
        tokenizer: the run's tokenizer.
        stage: `IMAGES` or `VIDEO`.
        name: of what is trained.
        before: where the image model lies that it begins with; `None` begins with fresh networks.
        seed: random seed of initialisation, order and noise; a resumed run goes on as it would have.
        steps: number of optimiser steps.
        device: where this process trains.
        rank: number of this process.
        processes: how many train together; each takes `stage.samples` samples a step.
    """
    torch.manual_seed(seed)
    model = _start(stage, before, tokenizer).to(device, memory_format=torch.channels_last)
    again = stage.name == "images" and before is not None
    rate = stage.rate * (_AGAIN if again else 1)
    latents, tokens = load_shards(folder / f"latents-{name}")
    latents = latents[:, 0] if stage.name == "images" else latents.transpose(1, 2)
    loss = velocity_loss(stage.samples, latents, tokens, tokenize(tokenizer, [""]), device)
    trained = fit(
        folder,
        name,
        model,
        loss,
        steps=steps,
        seed=seed,
        rate=rate,
        rates={"motion_modules": stage.motion_rate},
        decay=stage.decay,
        rank=rank,
        processes=processes,
    )
    if rank == 0:
        trained = trained.to("cpu", memory_format=torch.contiguous_format)
        save_model(trained.denoiser, folder / name / "unet")
        save_text_encoder(trained.text_encoder, folder / name / "text_encoder")
