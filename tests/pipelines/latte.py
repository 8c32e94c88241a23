"""Latte: spatial and temporal blocks in turn, guidance batched."""

from __future__ import annotations

import diffusers
import torch

from tests.pipelines.case import pipeline
from tests.pipelines.parts import TOKENS, autoencoder, t5, word_tokenizer

LATTE_TOKENS = 120  # fixed by its pipeline


@pipeline(denoiser="LatteTransformer3DModel", temporal=True, latents=(4, 8, 16))
def latte():
    """Two spatial and two temporal blocks on a 4×4×8 grid; heads of 8 numbers; the text keeps its padding."""
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=32,
        video_length=4,
    ).eval()
    with torch.no_grad():
        for block in transformer.transformer_blocks:  # else its maps are flat: no gradient
            block.attn2.to_q.weight.mul_(10)
            block.attn2.to_k.weight.mul_(10)
    pipe = diffusers.LattePipeline(
        transformer=transformer,
        vae=autoencoder(0),
        text_encoder=t5(32),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        tokenizer=word_tokenizer(TOKENS),
    )
    options = {"height": 8, "width": 16, "video_length": 4, "clean_caption": False}
    return pipe, {**options, "mask_feature": False}
