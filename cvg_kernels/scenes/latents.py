"""The training sets as latents: pictures and clips drawn, encoded once, and kept on disk in shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from cvg_kernels.scenes.captions import random_caption, random_clip
from cvg_kernels.scenes.world import FRAMES, render
from cvg_kernels.shapes.latents import tokenize
from cvg_kernels.writing import write_tensors

_SHARD = 512


def _source(seed: int, number: int, whole: bool) -> np.random.Generator:
    """What decides a clip, its caption first."""
    return np.random.default_rng((seed, 3 if whole else 4, number))


def captions_of(*, seed: int, clips: int, first: int = 0, whole: bool) -> list[str]:
    """The captions of the clips that `encode_shards` draws with the same arguments, in their order."""
    return [str(random_caption(_source(seed, first + number, whole))) for number in range(clips)]


@torch.no_grad()
def encode_shards(
    folder: Path,
    autoencoder: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    *,
    seed: int,
    clips: int,
    first: int = 0,
    whole: bool,
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Draws and encodes this process's share of the clips; shards that exist are kept.

    Each shard holds `latents` float16 `[512, F, 4, 16, 16]` and `tokens` int64 `[512, MAX_TOKENS]`. Clip number `i`
    depends on the seed and `i` alone.

    Args:
        folder: where the shards are.
        autoencoder: makes the latents, of the mean.
        tokenizer: tokenizer of the captions.
        seed: random seed of the run.
        clips: how many in all.
        first: number of the first of them.
        whole: all frames of each; if not, one at random, F = 1.
        rank: number of this process.
        processes: how many share the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(rank * _SHARD, clips, processes * _SHARD):
        path = folder / f"{start:06d}.safetensors"
        if path.exists():
            continue
        latents, texts = [], []
        for number in range(start, min(start + _SHARD, clips)):
            rng = _source(seed, first + number, whole)
            caption = random_caption(rng)
            bodies = random_clip(rng, caption, noisy=True)
            if not whole:
                still_frame = [int(rng.integers(FRAMES))]
                bodies = [dataclasses.replace(body, centres=body.centres[still_frame]) for body in bodies]
            frames = render([bodies])[0] * 2 - 1
            latents.append(autoencoder.encode(frames).latent_dist.mean)
            texts.append(str(caption))
        tokens = tokenize(tokenizer, texts)
        write_tensors(path, {"latents": torch.stack(latents).half().contiguous(), "tokens": tokens})
