"""Content: what a clip shows, as a CLIP embedding of an image, or of a text through a prior."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.functional import interpolate, normalize


def _features(output: Any) -> torch.Tensor:
    """The projected features; releases of transformers before 5 give them back bare."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _fetch(encoder: Any) -> None:
    """Has accelerate bring an offloaded encoder to its device, which it does by itself only for `forward`."""
    hook = getattr(encoder, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(encoder)


def embed_images(encoder: Any, images: torch.Tensor) -> torch.Tensor:
    """Embeds images by a CLIP.

    Args:
        encoder: a `transformers.CLIPModel`.
        images: `[B, 3, H, W]` in [0, 1], resized to the size that the encoder knows.

    Returns:
        `[B, D]` of length 1.
    """
    _fetch(encoder)
    size = encoder.config.vision_config.image_size
    if images.shape[-2:] != (size, size):
        images = interpolate(images, (size, size), mode="bilinear", antialias=True)
    pixels = (2 * images - 1).to(encoder.dtype)
    return normalize(_features(encoder.get_image_features(pixel_values=pixels)), dim=-1)


def embed_texts(encoder: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Embeds token ids `[B, N]` by a CLIP as `[B, D]` of length 1."""
    _fetch(encoder)
    return normalize(_features(encoder.get_text_features(input_ids=tokens)), dim=-1)


def content_tokens(embedding: torch.Tensor, width: int) -> torch.Tensor:
    """Cuts an embedding into the tokens that cross-attention reads.

    Args:
        embedding: `[B, D]` of length 1, or zeros for no content.
        width: width of a token; D is a multiple of it.

    Returns:
        `[B, D / width, width]`, scaled so that a number has variance 1.
    """
    return (embedding * embedding.shape[1] ** 0.5).unflatten(1, (-1, width))


@torch.no_grad()
def predict_image_embedding(
    prior: Any,
    text_embedding: torch.Tensor,
    scheduler: Any = None,
    *,
    steps: int = 20,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Predicts, from the embedding of a text, that of an image it describes.

    Without a scheduler the prior is a regression: its answer to no image at all. With one it is a diffusion model of
    image embeddings, sampled.

    Args:
        prior: a `diffusers.PriorTransformer`.
        text_embedding: `[B, D]` of length 1.
        scheduler: scheduler of the diffusion prior, which predicts the clean sample; `None` for a regression.
        steps: number of steps of the diffusion.
        generator: source of its noise, one or one a text.

    Returns:
        `[B, D]` of length 1.
    """
    scale = text_embedding.shape[1] ** 0.5  # the prior knows numbers of variance 1
    text = (text_embedding * scale).to(prior.dtype)
    if scheduler is None:
        found = prior(torch.zeros_like(text), 0, text).predicted_image_embedding
        return normalize(found.to(text_embedding.dtype), dim=-1)
    scheduler.set_timesteps(steps, device=text.device)
    noisy = randn_tensor(text.shape, generator=generator, device=text.device, dtype=text.dtype)
    for timestep in scheduler.timesteps:
        clean = prior(noisy, timestep, text).predicted_image_embedding
        noisy = scheduler.step(clean, timestep, noisy, generator=generator).prev_sample
    return normalize(noisy.to(text_embedding.dtype), dim=-1)
