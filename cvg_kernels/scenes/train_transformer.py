"""The video transformer of the world of scenes, with its text encoder: pictures first, then clips.

It sees the latents that the UNet was trained on, in the order of its cycles.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from cvg_kernels.scenes.train_denoiser import velocity_loss
from cvg_kernels.scenes.transformer import build_t5_encoder, build_transformer
from cvg_kernels.shapes.files import load_model, save_model
from cvg_kernels.shapes.latents import tokenize
from cvg_kernels.training.fit import fit


class TextToVideo(nn.Module):
    """Text encoder and transformer as one module: (noisy latents, timesteps, token ids) → prediction."""

    def __init__(self, text_encoder: T5EncoderModel, denoiser: CogVideoXTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.denoiser = denoiser

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predicts v for `noisy` `[B, C, h, w]` (pictures) or `[B, C, F, h, w]` (clips)."""
        text = self.text_encoder(tokens).last_hidden_state
        clips = noisy if noisy.ndim == 5 else noisy[:, :, None]
        found = self.denoiser(clips.transpose(1, 2), text, timesteps, return_dict=False)[0].transpose(1, 2)
        return found if noisy.ndim == 5 else found[:, :, 0]


@dataclass(frozen=True)
class TransformerStage:
    """What tells the stage of pictures and the stage of clips apart."""

    name: str
    samples: int  # of a step
    rate: float
    decay: float  # of the moving average of the weights


#: Two cycles of the learning rate each.
PICTURES = (
    TransformerStage("transformer-images", 48, rate=1.5e-3, decay=0.998),
    TransformerStage("transformer-images-2", 48, rate=9e-4, decay=0.998),
)
CLIPS = (
    TransformerStage("transformer-video", 8, rate=6e-4, decay=0.996),
    TransformerStage("transformer-video-2", 8, rate=6e-4, decay=0.998),
)


def train_transformer(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    stage: TransformerStage,
    latents: torch.Tensor,
    captions: list[str],
    *,
    before: Path | None,
    seed: int,
    steps: int,
    device: torch.device,
) -> None:
    """Trains one stage with v-prediction and saves its moving average to
    `folder/<stage>/{transformer,text_encoder}`; the loss is `velocity_loss`.

    Args:
        folder: the run's folder.
        tokenizer: the transformer's tokenizer.
        stage: one of `PICTURES` or `CLIPS`.
        latents: `[N, C, h, w]` or `[N, C, F, h, w]`, all of them.
        captions: of each.
        before: where the networks lie that it begins with; `None` begins with fresh ones.
        seed: random seed of initialisation, order and noise; a resumed run goes on as it would have.
        steps: number of optimiser steps.
        device: where to train.
    """
    torch.manual_seed(seed)
    if before is None:
        model = TextToVideo(build_t5_encoder(tokenizer), build_transformer())
    else:
        model = TextToVideo(
            load_model(T5EncoderModel, before / "text_encoder"),
            load_model(CogVideoXTransformer3DModel, before / "transformer"),
        )
    loss = velocity_loss(stage.samples, latents, tokenize(tokenizer, captions), tokenize(tokenizer, [""]), device)
    trained = fit(
        folder, stage.name, model.to(device), loss, steps=steps, seed=seed, rate=stage.rate, decay=stage.decay
    )
    trained = trained.to("cpu")
    save_model(trained.denoiser, folder / stage.name / "transformer")
    save_model(trained.text_encoder, folder / stage.name / "text_encoder")
