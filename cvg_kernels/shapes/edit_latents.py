"""The training set of the editor: clips with what the denoiser is told of them, encoded once and kept on disk in
shards.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvg_kernels.editing.content import embed_images
from cvg_kernels.editing.depth import estimate_depth
from cvg_kernels.editing.structure import MOST_ROUNDS, structure_latents, structure_maps
from cvg_kernels.shapes.latents import read_shards, tokenize
from cvg_kernels.shapes.train_content import still
from cvg_kernels.shapes.world import caption, random_scene, render
from cvg_kernels.writing import write_tensors

_SHARD = 128  # clips
_LEVELS = 2  # of structure kept of each clip
_SPEED = (0.5, 6.0)  # pixels a frame: people bring clips of any speed


@dataclass(frozen=True)
class EditClips:
    """Clips to learn editing from, N of them, F frames each.

    Attributes:
        latents: float16 `[N, F, C, h, w]`.
        structures: float16 `[N, 2, F, C, h, w]`, the latents of their structure at two levels.
        levels: int64 `[N, 2]`, the t_s of those.
        embeddings: float16 `[N, F, D]`, the content of every frame.
        tokens: int64 `[N, 2, MAX_TOKENS]`, the caption without and with the motion.
    """

    latents: torch.Tensor
    structures: torch.Tensor
    levels: torch.Tensor
    embeddings: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def _encode(number: int, seed: int, pipe: Any) -> dict[str, torch.Tensor]:
    """Clip `number`, which depends on it and the seed alone."""
    rng = np.random.default_rng((seed, 5, number))
    scene = random_scene(rng, speed=_SPEED, apart=bool(rng.random() < 0.5))
    clip = render([scene])[0]
    levels = torch.from_numpy(rng.permutation(MOST_ROUNDS + 1)[:_LEVELS].copy())
    depth = estimate_depth(pipe.depth_estimator, clip)
    structure = structure_maps(depth.expand(_LEVELS, *depth.shape), levels)
    captions = [caption([still(thing) for thing in scene.things]), scene.caption]
    return {
        "latents": pipe.vae.encode(clip * 2 - 1).latent_dist.mean.half(),
        "structures": structure_latents(pipe.vae, structure).transpose(1, 2).half(),
        "levels": levels,
        "embeddings": embed_images(pipe.content_encoder, clip).half(),
        "tokens": tokenize(pipe.tokenizer, captions),
    }


def encode_edit_clips(folder: Path, pipe: Any, *, seed: int, clips: int, rank: int = 0, processes: int = 1) -> None:
    """Draws and encodes this process's share of the clips; shards that exist are kept.

    Args:
        folder: where the shards go.
        pipe: has the trained `vae`, `depth_estimator`, `content_encoder` and `tokenizer`.
        seed: random seed of the run.
        clips: how many there are in all.
        rank: number of this process.
        processes: how many share the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(rank * _SHARD, clips, processes * _SHARD):
        path = folder / f"{start:06d}.safetensors"
        if path.exists():
            continue
        encoded = [_encode(number, seed, pipe) for number in range(start, min(start + _SHARD, clips))]
        joined = {key: torch.stack([one[key] for one in encoded]).contiguous() for key in encoded[0]}
        write_tensors(path, joined)


def load_edit_clips(folder: Path) -> EditClips:
    """All clips of a folder of shards."""
    return EditClips(**read_shards(folder, (field.name for field in fields(EditClips))))
