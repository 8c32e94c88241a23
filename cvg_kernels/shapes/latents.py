"""The training set as latents: clips drawn, encoded once, and kept on disk in shards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from cvg_kernels.errors import ArgumentError
from cvg_kernels.reading import read_tensors
from cvg_kernels.shapes.world import random_scene, render
from cvg_kernels.writing import write_tensors

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
        scenes = [random_scene(np.random.default_rng((seed, 3, number)), speed=speed) for number in numbers]
        latents = [autoencoder.encode(render([scene])[0] * 2 - 1).latent_dist.mean for scene in scenes]
        tokens = tokenize(tokenizer, [scene.caption for scene in scenes])
        write_tensors(path, {"latents": torch.stack(latents).half().contiguous(), "tokens": tokens})


def load_shards(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All latents `[N, F, 4, 8, 8]` float16 and tokens `[N, MAX_TOKENS]` of a folder of shards."""
    shards = read_shards(folder, ("latents", "tokens"))
    return shards["latents"], shards["tokens"]


def read_shards(folder: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Reads all shards of a folder and joins them.

    Args:
        folder: with files `NNNNNN.safetensors`.
        names: names of the tensors that each of them holds.

    Raises:
        ArgumentError: if there is none, or one that holds something else or does not fit the first.
    """
    names, shards = tuple(names), []
    for path in sorted(folder.glob("*.safetensors")):
        found = read_tensors(path)
        shapes = {name: tensor.shape[1:] for name, tensor in found.items()}
        if set(shapes) != set(names) or len({len(tensor) for tensor in found.values()}) != 1:
            raise ArgumentError(
                f"{path} must hold as many rows of {', '.join(names)}, got {', '.join(sorted(shapes))}"
            )
        first = shards[0] if shards else found
        for name, shape in shapes.items():
            if shape != first[name].shape[1:] or found[name].dtype != first[name].dtype:
                raise ArgumentError(f"{path} has {name} of another shape or dtype than the first shard")
        shards.append(found)
    if not shards:
        raise ArgumentError(f"{folder} must hold shards NNNNNN.safetensors, got none")
    return {name: torch.cat([shard[name] for shard in shards]) for name in names}
