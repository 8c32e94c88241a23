"""AnimateDiff and ModelScope, and what diffusers builds on them: temporal layers, guidance batched."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from transformers import CLIPTextModelWithProjection

from tests.pipelines.case import pipeline
from tests.pipelines.parts import (
    TOKENS,
    autoencoder,
    clip,
    clip_config,
    clip_of,
    clip_processor,
    clip_vision,
    image,
    word_tokenizer,
)

_animatediff_case = functools.partial(pipeline, denoiser="UNetMotionModel", temporal=True, latents=(4, 5, 7))
_modelscope_case = functools.partial(pipeline, denoiser="UNet3DConditionModel", temporal=True, latents=(4, 8, 8))

_MOTION = {
    "block_out_channels": (8, 8),
    "motion_layers_per_block": 1,
    "motion_norm_num_groups": 2,
    "motion_num_attention_heads": 4,
}
_CONTROL = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "in_channels": 4,
    "cross_attention_dim": 8,
    "conditioning_embedding_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 2,
}
_SIZE = {"height": 40, "width": 56}
_CALL = {**_SIZE, "num_frames": 4}
_V2V = {"strength": 0.7, "num_inference_steps": 5}


def small_unet() -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=4,
        norm_num_groups=2,
    )


def _parts() -> dict[str, Any]:
    unet = small_unet()
    adapter = diffusers.MotionAdapter(**_MOTION)
    return {
        "vae": autoencoder(3),
        "text_encoder": clip(8),
        "tokenizer": word_tokenizer(TOKENS),
        "unet": unet,
        "motion_adapter": adapter,
        "scheduler": diffusers.DDIMScheduler(clip_sample=False),
    }


@_animatediff_case()
def animatediff():
    """Latents of 5×7, so a level is rounded up to 3×4; heads of 2 numbers."""
    return diffusers.AnimateDiffPipeline(**_parts()), dict(_CALL)


@_animatediff_case()
def animatediff_sdxl():
    """Two text encoders, joined by channel; more conditions in `added_cond_kwargs`."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        norm_num_groups=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
    )
    adapter = diffusers.MotionAdapter(**{**_MOTION, "block_out_channels": (8, 16)}, use_motion_mid_block=False)
    second = CLIPTextModelWithProjection(clip_config(8, projection_dim=8)).eval()
    parts = {**_parts(), "unet": unet, "motion_adapter": adapter}
    pipe = diffusers.AnimateDiffSDXLPipeline(text_encoder_2=second, tokenizer_2=word_tokenizer(TOKENS), **parts)
    return pipe, dict(_CALL)


def _controlnet() -> diffusers.ControlNetModel:
    return diffusers.ControlNetModel(**_CONTROL, down_block_types=("CrossAttnDownBlock2D",) * 2, attention_head_dim=4)


@_animatediff_case(task="control", takes=("conditioning_frames",))
def animatediff_controlnet():
    pipe = diffusers.AnimateDiffControlNetPipeline(controlnet=_controlnet(), **_parts())
    return pipe, {**_CALL, "conditioning_frames": clip_of(56, 40, 4)}


@_animatediff_case(task="control", takes=("conditioning_frames",))
def animatediff_sparsectrl():
    """The control is one frame, the first."""
    control = diffusers.SparseControlNetModel(
        **_CONTROL,
        conditioning_channels=3,
        down_block_types=("CrossAttnDownBlockMotion",) * 2,
        use_simplified_condition_embedding=False,
        num_attention_heads=4,
        motion_num_attention_heads=4,
    )
    pipe = diffusers.AnimateDiffSparseControlNetPipeline(controlnet=control, **_parts())
    return pipe, {**_CALL, "conditioning_frames": clip_of(56, 40, 1), "controlnet_frame_indices": [0]}


@_animatediff_case(task="video-to-video", takes=("video",), strength=0.7)
def animatediff_v2v():
    pipe = diffusers.AnimateDiffVideoToVideoPipeline(**_parts())
    return pipe, {**_SIZE, **_V2V, "video": clip_of(56, 40, 4)}


@_animatediff_case(task="video-to-video", takes=("video", "conditioning_frames"), strength=0.7)
def animatediff_v2v_controlnet():
    pipe = diffusers.AnimateDiffVideoToVideoControlNetPipeline(controlnet=_controlnet(), **_parts())
    frames = clip_of(56, 40, 4)
    return pipe, {**_SIZE, **_V2V, "video": frames, "conditioning_frames": frames[::-1]}


@_animatediff_case(branches=("uncond", "cond", "perturbed"))
def animatediff_pag():
    """Perturbed attention guidance: a third branch, whose self-attention in the middle is the identity."""
    pipe = diffusers.AnimateDiffPAGPipeline(pag_applied_layers=["mid.*attn1"], **_parts())
    return pipe, {**_CALL, "pag_scale": 3.0}


@_animatediff_case(branches=("cond", "perturbed"))
def animatediff_pag_alone():
    """Perturbed attention guidance without classifier-free guidance."""
    pipe, options = animatediff_pag.build()
    return pipe, {**options, "guidance_scale": 1.0}


@_animatediff_case(takes=("ip_adapter_image_embeds",))
def animatediff_ip_adapter():
    """An image prompt beside the text: two attentions in each cross layer, by processors that have weights."""
    pipe = diffusers.AnimateDiffPipeline(image_encoder=clip_vision(8), feature_extractor=clip_processor(), **_parts())
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))
    return pipe, {**_CALL, "ip_adapter_image_embeds": [embeds]}


def ip_adapter_weights(unet: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Under the names of released adapters, which number the attention layers and count self-attention."""
    adapter = {}
    cross = [n for n in unet.attn_processors if "attn2" in n and "motion_modules" not in n]
    for at in range(len(cross)):
        for kind in ("k", "v"):
            adapter[f"{2 * at + 1}.to_{kind}_ip.weight"] = torch.randn(8, 8) / 8**0.5
    width = 4 * 8  # four tokens
    projection = {
        "proj.weight": torch.randn(width, 8) / 8**0.5,
        "proj.bias": torch.zeros(width),
        "norm.weight": torch.ones(8),
        "norm.bias": torch.zeros(8),
    }
    return {"image_proj": projection, "ip_adapter": adapter}


def _freenoise(frames: int) -> tuple[Any, dict[str, Any]]:
    pipe, options = animatediff.build()
    pipe.enable_free_noise(context_length=8, context_stride=4)
    return pipe, {**options, "num_frames": frames}


@_animatediff_case(latents=(12, 5, 7))
def animatediff_freenoise():
    """12 frames by two windows of 8."""
    return _freenoise(12)


@_animatediff_case(latents=(8, 5, 7))
def animatediff_freenoise_one_window():
    return _freenoise(8)


@_animatediff_case(latents=(12, 5, 7))
def animatediff_freenoise_prompts():
    """The prompt changes on the way: its embeddings are mixed frame by frame."""
    pipe, options = _freenoise(12)
    return pipe, {**options, "prompt": {0: "a red cat", 8: "a blue dog"}}


@_animatediff_case(latents=(12, 5, 7))
def animatediff_freenoise_split():
    """Its layers see pieces of the places and of the frames, to save memory."""
    pipe, options = _freenoise(12)
    pipe.enable_free_noise_split_inference(spatial_split_size=16, temporal_split_size=5)
    return pipe, options


@_animatediff_case(rounds=2)
def animatediff_freeinit():
    pipe, options = animatediff.build()
    pipe.enable_free_init(num_iters=2)
    return pipe, options


@_animatediff_case(task="image-to-video", takes=("image",), condition_channels=5)
def pia():
    """The image's latents and a mask beside the noise."""
    adapter = diffusers.MotionAdapter(conv_in_channels=9, **_MOTION)
    pipe = diffusers.PIAPipeline(**{**_parts(), "motion_adapter": adapter})
    return pipe, {**_CALL, "image": image(56, 40)}


@_modelscope_case()
def modelscope():
    """Two levels, double temporal self-attention; heads of 4 numbers."""
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=4,
        norm_num_groups=2,
    )
    pipe = diffusers.TextToVideoSDPipeline(
        unet=unet,
        vae=autoencoder(0),
        text_encoder=clip(4),
        tokenizer=word_tokenizer(TOKENS),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )
    return pipe, {"height": 8, "width": 8, "num_frames": 4}


@_modelscope_case(task="video-to-video", takes=("video",), strength=0.7)
def modelscope_v2v():
    pipe, _ = modelscope.build()
    pipe = diffusers.VideoToVideoSDPipeline(**pipe.components)
    return pipe, {**_V2V, "video": clip_of(8, 8, 4)}
