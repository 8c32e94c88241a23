"""CogVideoX: text and video in one sequence, frames before channels in the latents, guidance batched."""

from __future__ import annotations

import functools
from typing import Any

import diffusers

from tests.pipelines.case import pipeline
from tests.pipelines.parts import TOKENS, clip_of, image, t5, t5_tokenizer, word_tokenizer

_case = functools.partial(pipeline, denoiser="CogVideoXTransformer3DModel", latents=(3, 4, 6), channel_axis=2)
_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 6,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": TOKENS,
    "use_rotary_positional_embeddings": True,
}
_SIZE = {"height": 16, "width": 24, "max_sequence_length": TOKENS}
_CALL = {**_SIZE, "num_frames": 9}


def _parts(**changes: Any) -> dict[str, Any]:
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 3,
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    transformer = diffusers.CogVideoXTransformer3DModel(**{**_TRANSFORMER, **changes}).eval()
    return {
        "vae": vae,
        "transformer": transformer,
        "text_encoder": t5(32),
        "tokenizer": t5_tokenizer(),
        "scheduler": diffusers.CogVideoXDDIMScheduler(),
    }


@_case()
def cogvideox(patch_size_t: int | None = None):
    """Two blocks on a 3×2×3 grid with rotary positions; heads of 16 numbers. `patch_size_t=2`: as CogVideoX 1.5."""
    parts = _parts(patch_size_t=patch_size_t, patch_bias=patch_size_t is None)
    return diffusers.CogVideoXPipeline(**{**parts, "tokenizer": word_tokenizer(TOKENS)}), dict(_CALL)


@_case(latents=(4, 4, 6))
def cogvideox15():
    """Tokens of two frames each: a frame is put before the three."""
    return cogvideox.build(patch_size_t=2)


@_case(task="image-to-video", takes=("image",), condition_channels=4)
def cogvideox_i2v():
    pipe = diffusers.CogVideoXImageToVideoPipeline(**_parts(in_channels=8))
    return pipe, {**_CALL, "image": image(24, 16)}


@_case(task="video-to-video", takes=("video",), strength=0.7)
def cogvideox_v2v():
    pipe = diffusers.CogVideoXVideoToVideoPipeline(**_parts())
    video = clip_of(24, 16, 9)
    return pipe, {**_SIZE, "video": video, "strength": 0.7, "num_inference_steps": 5}


@_case(task="control", takes=("control_video",), condition_channels=4)
def cogvideox_fun_control():
    """The control's latents beside the noise."""
    pipe = diffusers.CogVideoXFunControlPipeline(**_parts(in_channels=8))
    return pipe, {**_SIZE, "control_video": clip_of(24, 16, 9)}
