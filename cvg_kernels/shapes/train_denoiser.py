"""Second and third stage of the shapes model: the denoiser, on images first and then on video.

Images come first because the spatial layers, which see the words, then learn objects from independent pictures; the
motion modules are added to the trained image model, as AnimateDiff and Gen-1 do. The text encoder is trained along.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel, CLIPTokenizer

from cvg_kernels.shapes.files import load_model, save_model, save_text_encoder
from cvg_kernels.shapes.latents import load_shards, tokenize
from cvg_kernels.shapes.model import build_image_denoiser, build_motion_adapter, build_scheduler, build_text_encoder
from cvg_kernels.shapes.world import SPEED
from cvg_kernels.training.checkpoint import Checkpoint
from cvg_kernels.training.log import TrainingLog

_CAPTION_DROPOUT = 0.1  # the share of captions replaced by "", for classifier-free guidance


class TextToLatents(nn.Module):
    """Text encoder and denoiser as one module: (noisy latents, timesteps, token ids) → prediction."""

    def __init__(self, text_encoder: CLIPTextModel, denoiser: UNet2DConditionModel | UNetMotionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.denoiser = denoiser

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predicts v for `noisy` `[B, C, h, w]` (images) or `[B, C, F, h, w]` (video)."""
        text = self.text_encoder(tokens).last_hidden_state
        if noisy.ndim == 5:  # every frame reads the same words
            text = text.repeat_interleave(noisy.shape[2], dim=0)
        return self.denoiser(noisy, timesteps, text, return_dict=False)[0]


@dataclass(frozen=True)
class Lesson:
    """An easier task to begin with: some captions only, and much noise only."""

    until: int  # the step that ends it
    without: tuple[str, ...]  # words that its captions do not have
    least_noise: int  # smallest timestep


@dataclass(frozen=True)
class Stage:
    """What tells the image stage and the video stage apart."""

    name: Literal["images", "video"]
    samples: int  # per process and step: frames or clips
    rate: float  # of the layers of the image model
    motion_rate: float  # of the motion modules
    speed: tuple[float, float]  # of the clips it learns from, in pixels a frame
    noise_power: float  # timesteps are drawn as 1000 · u^power, u uniform
    decay: float  # of the moving average of the weights
    lessons: tuple[Lesson, ...] = ()  # what it begins with, in order

    def lesson(self, step: int) -> Lesson:
        """What is learnt at a step: a lesson, or everything."""
        return next((one for one in self.lessons if step < one.until), Lesson(step + 1, (), 0))

    def draw(self, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Shapes chosen clips `[B, F, C, h, w]` for the stage's denoiser; images are a random frame of each."""
        if self.name == "video":
            return latents.transpose(1, 2)
        frame = torch.randint(latents.shape[1], latents.shape[:1], generator=generator)
        return latents[torch.arange(len(latents)), frame]

    def timesteps(self, count: int, least: int, generator: torch.Generator) -> torch.Tensor:
        """How much noise each sample gets, as a timestep in [least, 1000)."""
        if self.noise_power == 1:
            return torch.randint(least, 1000, (count,), generator=generator)
        fraction = torch.rand(count, generator=generator) ** self.noise_power
        return (least + (1000 - least) * fraction).long()


#: Pictures come from slow clips, whose objects are spread more evenly over the picture.
IMAGES = Stage("images", 48, rate=2e-3, motion_rate=2e-3, speed=(3.0, 4.5), noise_power=1.0, decay=0.999)
#: Where things go is decided while there is much noise, so more of the clips have much.
#: To begin with, one object that goes left: where it is follows from the frame. Then one direction more at a time:
#: from all four at once, whose pulls cancel, a small model does not find out what the words mean.
VIDEO = Stage(
    "video",
    12,
    rate=1e-3,
    motion_rate=2e-3,
    speed=SPEED,
    noise_power=0.6,
    decay=0.995,
    lessons=(
        Lesson(75, without=("and", "right", "up", "down"), least_noise=900),
        Lesson(200, without=("and", "up", "down"), least_noise=900),
        Lesson(320, without=("and", "down"), least_noise=900),
        Lesson(450, without=("and",), least_noise=900),
        Lesson(550, without=("and",), least_noise=500),
    ),
)


def clips_without(words: tuple[str, ...], tokens: torch.Tensor, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Numbers of the clips whose caption has none of the words; all of them if there would be none.

    Args:
        words: words of one token.
        tokens: `[N, MAX_TOKENS]`.
        tokenizer: what made them.
    """
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in words])
    found = torch.isin(tokens, ids).any(1)
    return torch.arange(len(tokens)) if found.all() else (~found).nonzero()[:, 0]


def _start(stage: Stage, folder: Path, tokenizer: CLIPTokenizer) -> TextToLatents:
    """The networks a stage begins with: fresh ones, or the image model with motion modules added."""
    if stage.name == "images":
        return TextToLatents(build_text_encoder(tokenizer), build_image_denoiser())
    text_encoder = load_model(CLIPTextModel, folder / "images" / "text_encoder")
    images = load_model(UNet2DConditionModel, folder / "images" / "unet")
    adapter: MotionAdapter = build_motion_adapter()
    return TextToLatents(text_encoder, UNetMotionModel.from_unet2d(images, adapter))


def train_denoiser(
    folder: Path,
    tokenizer: CLIPTokenizer,
    stage: Stage,
    *,
    seed: int,
    steps: int,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Trains one stage with v-prediction and saves its moving average to `folder/<stage>/{unet,text_encoder}`.

    Loss: ‖v_θ(α_t z + σ_t ε, t, c) − (α_t ε − σ_t z)‖², t as the stage draws it, AdamW with one learning-rate cycle.

    Args:
        folder: the run's folder, with `latents-<stage>/` made before.
        tokenizer: the run's tokenizer.
        stage: `IMAGES` or `VIDEO`.
        seed: random seed of initialisation, order and noise; a resumed run goes on as it would have.
        steps: number of optimiser steps.
        device: where this process trains.
        rank: number of this process.
        processes: how many train together; each takes `stage.samples` samples a step.
    """
    torch.manual_seed(seed)
    model = _start(stage, folder, tokenizer).to(device, memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(stage.decay))
    motion = [p for name, p in model.named_parameters() if "motion_modules" in name]
    others = [p for name, p in model.named_parameters() if "motion_modules" not in name]
    optimizer = torch.optim.AdamW([{"params": others}, *([{"params": motion}] if motion else [])], weight_decay=1e-2)
    rates = [stage.rate, stage.motion_rate][: len(optimizer.param_groups)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=0.03 if motion else 0.1
    )
    checkpoint = Checkpoint(
        folder / f"{stage.name}.safetensors", model=model, average=average, optimizer=optimizer, schedule=schedule
    )
    first = checkpoint.resume()
    predict = DistributedDataParallel(model) if processes > 1 else model

    noise_schedule = build_scheduler()
    latents, tokens = load_shards(folder / f"latents-{stage.name}")
    no_caption = tokenize(tokenizer, [""])
    left_out, clips = (), torch.arange(len(latents))
    with TrainingLog(folder, stage.name, first, steps, silent=rank > 0) as log:
        for step in range(first, steps):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + rank)
            lesson = stage.lesson(step)
            if lesson.without != left_out:
                left_out = lesson.without
                clips = clips_without(left_out, tokens, tokenizer)
            chosen = clips[torch.randint(len(clips), (stage.samples,), generator=generator)]
            clean = stage.draw(latents[chosen].float(), generator)
            noise = torch.randn(clean.shape, generator=generator)
            timesteps = stage.timesteps(len(chosen), lesson.least_noise, generator)
            dropped = torch.rand(chosen.shape, generator=generator) < _CAPTION_DROPOUT
            words = torch.where(dropped[:, None], no_caption, tokens[chosen])
            noisy = noise_schedule.add_noise(clean, noise, timesteps)
            target = noise_schedule.get_velocity(clean, noise, timesteps)

            prediction = predict(noisy.to(device), timesteps.to(device), words.to(device))
            loss = nn.functional.mse_loss(prediction, target.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            log.step(loss)
            if rank == 0:
                checkpoint.save_sometimes(step + 1)

    if rank == 0:
        checkpoint.save(steps)
        trained: TextToLatents = average.module.to("cpu", memory_format=torch.contiguous_format)
        save_model(trained.denoiser, folder / stage.name / "unet")
        save_text_encoder(trained.text_encoder, folder / stage.name / "text_encoder")
