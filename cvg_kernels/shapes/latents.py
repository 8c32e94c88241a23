"""The training set as latents: clips drawn, encoded once, and kept on disk in shards."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from cvg_kernels.shapes.world import random_scene, render

_SHARD = 512  # clips


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids `[B, MAX_TOKENS]`, padded as the pipeline pads."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def encode_shards(
    folder: Path,
    autoencoder: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    *,
    seed: int,
    clips: int,
    speed: tuple[float, float],
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Draws and encodes this process's share of the clips; shards that exist are kept.

    Each shard holds `latents` float16 `[512, F, 4, 8, 8]` and `tokens` int64 `[512, MAX_TOKENS]`. Clip number `i`
    depends on the seed, the speed and `i` alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(rank * _SHARD, clips, processes * _SHARD):
        path = folder / f"{start:06d}.safetensors"
        if path.exists():
            continue
        numbers = range(start, min(start + _SHARD, clips))
        scenes = [
            random_scene(np.random.default_rng((seed, 3, number)), speed=speed)
            for number in numbers
        ]
        latents = [
            autoencoder.encode(render([scene])[0] * 2 - 1).latent_dist.mean for scene in scenes
        ]
        tokens = tokenize(tokenizer, [scene.caption for scene in scenes])
        partial = path.with_suffix(f".{rank}")
        save_file({"latents": torch.stack(latents).half().contiguous(), "tokens": tokens}, partial)
        os.replace(partial, path)


def load_shards(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All latents `[N, F, 4, 8, 8]` float16 and tokens `[N, MAX_TOKENS]` of a folder of shards."""
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return tuple(torch.cat([shard[name] for shard in shards]) for name in ("latents", "tokens"))
