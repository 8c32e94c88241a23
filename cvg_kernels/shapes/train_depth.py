"""The depth network of the editor: reads from a frame of the shapes world how near everything is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from cvg_kernels.shapes.files import save_model
from cvg_kernels.shapes.world import SIZE, random_scene, render, render_depth
from cvg_kernels.training.fit import fit

_BATCH = 16
_RATE = 1e-3
_SPEED = (0.0, 6.0)
_NOISE = 0.03  # largest deviation of the noise on the frames it learns from: clips that people bring are not clean
_PATCH = 8


def build_depth_estimator() -> DepthAnythingForDepthEstimation:
    """A Depth Anything network of 0.3 M parameters; its last layer ends in a ReLU, which starts on the living side."""
    backbone = Dinov2Config(
        image_size=SIZE,
        patch_size=_PATCH,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        out_features=[f"stage{number}" for number in range(1, 5)],
        reshape_hidden_states=False,
    )
    model = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=_PATCH,
            reassemble_hidden_size=64,
            reassemble_factors=[4, 2, 1, 0.5],
            neck_hidden_sizes=[16, 32, 64, 64],
            fusion_hidden_size=24,
            head_in_index=-1,
            head_hidden_size=16,
        )
    )
    torch.nn.init.constant_(model.head.conv3.bias, 0.1)
    return model


def depth_frames(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Single frames `[count, 3, H, W]` in [0, 1] of fresh scenes, and their depth `[count, H, W]`."""
    scenes = [random_scene(rng, frames=1, speed=_SPEED, apart=bool(rng.random() < 0.5)) for _ in range(count)]
    return render(scenes)[:, 0], render_depth(scenes)[:, 0]


def _error(model: DepthAnythingForDepthEstimation, rng: np.random.Generator, device: torch.device) -> torch.Tensor:
    frames, depth = depth_frames(rng, _BATCH)
    noise = torch.randn_like(frames) * (_NOISE * torch.rand(len(frames), 1, 1, 1))
    pixels = 2 * (frames + noise).clamp(0, 1).to(device) - 1  # as `estimate_depth` gives them
    found = model(pixel_values=pixels).predicted_depth
    return (found - depth.to(device)).square().mean()


def train_depth_estimator(
    folder: Path, *, seed: int, steps: int, device: torch.device
) -> DepthAnythingForDepthEstimation:
    """Trains the depth network on rendered frames and saves it to `folder/depth_estimator`.

    Loss: the mean over pixels of (depth − true depth)², on frames with a little noise. (The median of a frame is the
    ground: with |depth − true depth| a fresh network learns to see nothing.)
    """
    torch.manual_seed(seed)
    model = build_depth_estimator().to(device)
    fit(folder, "depth", model, lambda model, rng: _error(model, rng, device), steps=steps, seed=seed, rate=_RATE)
    save_model(model.eval().to("cpu"), folder / "depth_estimator")
    return model
