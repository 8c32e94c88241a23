"""From many attention maps to one small video: a transformer decides how much each map counts in each channel."""

from __future__ import annotations

import math

import torch
from torch import nn

from cvg_kernels.composition.features import Selection

ROLES = 2  # an entity's own maps, and those of the other entities


class Aggregator(nn.Module):
    """θ_agg: the maps of an entity at each step → a spatio-temporal volume per step.

    A map m (of a layer, a head and a role) is standardised with the statistics of training, x_m = (A_m − μ_m) / σ_m,
    and becomes one token: a projection of the flattened x_m plus embeddings of layer, head, role and timestep. A
    transformer lets the tokens see each other and turns each into the weights of its map,

        Â[c] = M^(−1/2) · Σ_m w_{m,c} · x_m

    so that the volume keeps place and time as the generator had them. The CVG paper says "Transformer aggregation"
    with layer, head and temporal embeddings and gives neither read-out nor sizes; these are ours.

    Args:
        selection: which maps.
        timesteps: timesteps of the steps read in training, `[T]`; the statistics are theirs.
        channels: c, of the volume.
        width: width of the tokens.
        depth: depth of the transformer.
        heads: heads of the transformer.
    """

    layer: torch.Tensor
    head: torch.Tensor
    timesteps: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        selection: Selection,
        timesteps: list[float],
        *,
        channels: int = 16,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.settings = {"channels": channels, "width": width, "depth": depth, "heads": heads}
        layer, head = selection.places()
        self.register_buffer("layer", layer, persistent=False)
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("timesteps", torch.tensor(timesteps), persistent=False)
        statistics = len(timesteps), ROLES, selection.maps
        self.register_buffer("mean", torch.zeros(statistics))
        self.register_buffer("std", torch.ones(statistics))
        self.project = nn.Linear(math.prod(selection.grid), width)
        self.layer_embedding = nn.Embedding(len(selection.layers), width)
        self.head_embedding = nn.Embedding(max(selection.heads), width)
        self.role_embedding = nn.Embedding(ROLES, width)
        self.time_embedding = nn.Sequential(
            nn.Linear(width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        block = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.attend = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))

    def fit_statistics(self, step: int, maps: torch.Tensor) -> None:
        """Takes mean and standard deviation of each map at one step from training maps `[N, R, M, F, h, w]`."""
        values = maps.movedim(0, 2).flatten(2)  # [R, M, N·F·h·w]
        self.mean[step] = values.mean(-1)
        self.std[step] = values.std(-1).clamp_min(1e-6)

    def forward(self, maps: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The volumes `[N, T, c, F, h, w]`.

        Args:
            maps: `[N, T, R, M, F, h, w]`.
            timesteps: float `[T]`.
        """
        trained = (timesteps[:, None] - self.timesteps).abs().argmin(1)
        mean, std = (s[trained][..., None, None, None] for s in (self.mean, self.std))
        x = ((maps - mean) / std).flatten(0, 1).flatten(3)  # [N·T, R, M, F·h·w]

        time = self.time_embedding(_sinusoid(timesteps / 1000, self.project.out_features))  # [T, width]
        tokens = self.project(x) + self.layer_embedding(self.layer) + self.head_embedding(self.head)
        tokens = tokens + self.role_embedding.weight[:, None] + time.repeat(len(maps), 1)[:, None, None]
        weights = self.attend(self.blocks(tokens.flatten(1, 2)))  # [N·T, R·M, c]
        volume = weights.mT @ x.flatten(1, 2) / x[0, :, :, 0].numel() ** 0.5
        return volume.unflatten(2, maps.shape[-3:]).unflatten(0, maps.shape[:2])


def _sinusoid(time: torch.Tensor, width: int) -> torch.Tensor:
    """Sine and cosine of a time in [0, 1] at frequencies from 1 to 100, `[T, width]`."""
    frequencies = 100 ** torch.linspace(0, 1, width // 2, device=time.device)
    angles = time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
