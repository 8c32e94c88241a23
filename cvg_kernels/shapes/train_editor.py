"""The denoiser of the editor: that of the shapes pipeline, taught to read structure and content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import UNetMotionModel
from torch import nn
from torch.nn.functional import mse_loss
from transformers import CLIPTokenizer

from cvg_kernels.editing.content import content_tokens
from cvg_kernels.editing.structure import LEVEL_CHANNELS, structure_channels
from cvg_kernels.pipeline.temporal_layers import temporal_layers_off
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.shapes.edit_latents import EditClips, load_edit_clips
from cvg_kernels.shapes.files import save_model
from cvg_kernels.shapes.latents import tokenize
from cvg_kernels.shapes.model import build_scheduler
from cvg_kernels.training.fit import fit

_CLIPS = 12  # of a step on video
_IMAGES = 64  # of a step on single frames
_IMAGE_STEPS = 0.3  # their share
_NO_WORDS = 0.6  # share of samples without their caption: content comes from the embedding
_NO_CONTENT = 0.15  # share without the embedding, for classifier-free guidance
_NOISE_POWER = 0.7  # timesteps are drawn as 1000 · u^power
_RATE = 7e-4


@torch.no_grad()
def widened(denoiser: UNetMotionModel) -> UNetMotionModel:
    """A text-to-video denoiser that takes structure beside its latents, and as yet makes nothing of it.

    Args:
        denoiser: denoiser of the shapes pipeline.
    """
    channels = denoiser.config.in_channels
    wide = UNetMotionModel.from_config({**denoiser.config, "in_channels": 2 * channels + LEVEL_CHANNELS})
    weights = denoiser.state_dict()
    first = torch.zeros_like(wide.conv_in.weight)
    first[:, :channels] = weights["conv_in.weight"]
    wide.load_state_dict(weights | {"conv_in.weight": first})
    return wide


class Editing:
    """The task: v-prediction of clips and of single frames, told their structure, their content and sometimes words.

    Args:
        clips: to learn from.
        text_encoder: text encoder of the shapes pipeline, as it is.
        tokenizer: its tokenizer.
        images: share of the steps on single frames, without temporal layers; 0 learns from video alone.
    """

    def __init__(
        self, clips: EditClips, text_encoder: nn.Module, tokenizer: CLIPTokenizer, images: float = _IMAGE_STEPS
    ) -> None:
        self.clips, self.images = clips, images
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.no_words = tokenize(tokenizer, [""])[0]
        self.schedule = build_scheduler()

    def __call__(self, model: UNetMotionModel, rng: np.random.Generator) -> torch.Tensor:
        """The loss ‖v_θ([z_t, E(s), t_s], t, words, content) − v‖² of a step."""
        alone = bool(rng.random() < self.images)
        count = _IMAGES if alone else _CLIPS
        chosen = torch.from_numpy(rng.integers(len(self.clips.latents), size=count))
        level = torch.randint(2, (count,))
        frames = self.clips.latents.shape[1]
        latents = self.clips.latents[chosen].float().transpose(1, 2)
        structure = self.clips.structures[chosen, level].float().transpose(1, 2)
        if alone:  # a random frame of each
            frame = torch.randint(frames, (count,))
            indices = torch.arange(count)
            latents, structure = (each[indices, :, frame][:, :, None] for each in (latents, structure))
            frames = 1
        shown = torch.randint(self.clips.embeddings.shape[1], (count,))
        embedding = self.clips.embeddings[chosen, shown].float()
        embedding = embedding * (torch.rand(count, 1) >= _NO_CONTENT)
        told = torch.rand(count, 1) >= _NO_WORDS
        tokens = torch.where(told, self.clips.tokens[chosen, torch.randint(2, (count,))], self.no_words)
        text = self.text_encoder(tokens).last_hidden_state
        text = torch.cat([text, content_tokens(embedding, text.shape[-1])], 1)

        noise = torch.randn_like(latents)
        timesteps = (1000 * torch.rand(count) ** _NOISE_POWER).long()
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = self.schedule.get_velocity(latents, noise, timesteps)
        channels = structure_channels(structure, self.clips.levels[chosen, level])
        inputs = torch.cat([noisy, channels], 1), timesteps, text.repeat_interleave(frames, 0)
        inputs = [each.to(model.device) for each in inputs]
        if alone:
            with temporal_layers_off(model):
                prediction = model(*inputs, return_dict=False)[0]
        else:
            prediction = model(*inputs, return_dict=False)[0]
        return mse_loss(prediction, target.to(prediction.device))


def train_editor(
    folder: Path,
    pipe: VideoPipeline,
    *,
    seed: int,
    steps: int,
    device: torch.device,
    name: str = "editor",
    images: float = _IMAGE_STEPS,
) -> UNetMotionModel:
    """Trains the editor's denoiser, from that of the shapes pipeline, and saves it to `folder/<name>-unet`.

    Args:
        folder: the run's folder, with the clips of `encode_edit_clips` in `edit-clips/`.
        pipe: the shapes pipeline.
        seed: random seed of the run.
        steps: number of optimiser steps.
        device: where to train.
        name: name of the stage.
        images: share of the steps on single frames.
    """
    task = Editing(load_edit_clips(folder / "edit-clips"), pipe.text_encoder, pipe.tokenizer, images)
    model = widened(pipe.unet).to(device, memory_format=torch.channels_last).train()
    model = fit(
        folder, name, model, task, steps=steps, seed=seed, rate=_RATE, decay=0.998, rates={"conv_in": 3 * _RATE}
    )
    model = model.to("cpu", memory_format=torch.contiguous_format).eval()
    save_model(model, folder / f"{name}-unet")
    return model
