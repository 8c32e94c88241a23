"""Structure: how near everything is, with as much detail as is asked for,
as a denoiser reads it beside the latents.
"""

from __future__ import annotations

from typing import Any

import torch

from cvg_kernels.ops import depth_structure

#: Rounds of blur that Gen-1 knows: 0 keeps every outline, at 7 hardly more than the mean is left.
MOST_ROUNDS = 7
#: Channels that tell the denoiser how many rounds there were.
LEVEL_CHANNELS = 4
_LONGEST_PERIOD = 64  # of the sinusoids, in rounds: one that turns and one that rises


def structure_maps(depth: torch.Tensor, rounds: int | torch.Tensor) -> torch.Tensor:
    """Takes detail out of the depth of clips, the nearest thing of each white and the farthest black.

        s = depth_structure((d − min d) / (max d − min d), t_s)

    Args:
        depth: `[B, F, H, W]`, larger nearer; a clip that is all equally near becomes black.
        rounds: t_s, a number or integers `[B]`.

    Returns:
        float32 `[B, F, H, W]` in [0, 1].

    Examples:
        >>> from cvg_kernels.editing import structure_maps
        >>> structure_maps(torch.rand(1, 8, 32, 32), 2).shape
        torch.Size([1, 8, 32, 32])
    """
    depth = depth.float()
    low, high = depth.amin((1, 2, 3), True), depth.amax((1, 2, 3), True)
    return depth_structure((depth - low) / (high - low).clamp_min(1e-6), rounds).clamp(0, 1)


def structure_latents(autoencoder: Any, frames: torch.Tensor) -> torch.Tensor:
    """Encodes structure by the autoencoder of the clips, as grey pictures.

    Args:
        autoencoder: a `diffusers.AutoencoderKL`.
        frames: `[B, F, H, W]` in [0, 1].

    Returns:
        `[B, C, F, h, w]`, the means of the latents, scaled as the denoiser's own.
    """
    pixels = (2 * frames - 1).flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
    means = autoencoder.encode(pixels.to(autoencoder.dtype)).latent_dist.mean
    latents = means.unflatten(0, frames.shape[:2]) * autoencoder.config.scaling_factor
    return latents.transpose(1, 2)


def structure_channels(latents: torch.Tensor, rounds: int | torch.Tensor) -> torch.Tensor:
    """Puts the sinusoidal embedding of t_s beside the latents of the structure.

    Args:
        latents: `[B, C, F, h, w]`.
        rounds: t_s, a number or integers `[B]`.

    Returns:
        `[B, C + 4, F, h, w]`, what is concatenated to the noisy latents.
    """
    from diffusers.models.embeddings import get_timestep_embedding

    rounds = torch.as_tensor(rounds, device=latents.device).expand(len(latents))
    level = get_timestep_embedding(rounds, LEVEL_CHANNELS, max_period=_LONGEST_PERIOD)
    level = level.to(latents.dtype)[:, :, None, None, None].expand(-1, -1, *latents.shape[2:])
    return torch.cat([latents, level], 1)
