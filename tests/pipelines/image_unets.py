"""UNets that are given an image, and one made for images."""

from __future__ import annotations

import diffusers

from tests.pipelines.case import pipeline
from tests.pipelines.parts import TOKENS, autoencoder, clip, clip_processor, clip_vision, image, word_tokenizer
from tests.pipelines.unets import animatediff, small_unet


@pipeline(denoiser="I2VGenXLUNet", task="image-to-video", takes=("image",), temporal=True)
def i2vgenxl():
    """Tokens of the image behind those of the text."""
    unet = diffusers.I2VGenXLUNet(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        norm_num_groups=2,
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=4,
        attention_head_dim=4,
        num_attention_heads=None,
    )
    pipe = diffusers.I2VGenXLPipeline(
        vae=autoencoder(0),
        text_encoder=clip(4),
        tokenizer=word_tokenizer(TOKENS),
        image_encoder=clip_vision(4),
        feature_extractor=clip_processor(),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )
    # clip_skip: the default does not run with transformers 5
    size = {"height": 16, "width": 16, "num_frames": 2}
    return pipe, {**size, "image": image(16, 16), "target_fps": 8, "clip_skip": None}


@pipeline(
    denoiser="UNetSpatioTemporalConditionModel",
    task="image-to-video",
    takes=("image",),
    temporal=True,
    condition_channels=4,
    channel_axis=2,
)
def svd():
    """No text at all; its cross-attention sees one token, the image's."""
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=clip_vision(8, 224),
        unet=unet,
        scheduler=scheduler,
        feature_extractor=clip_processor(224),
    )
    size = {"height": 16, "width": 16, "num_frames": 2, "decode_chunk_size": 2}
    return pipe, {**size, "image": image(16, 16)}


@pipeline(denoiser="UNet2DConditionModel", extra_steps=1)
def text2video_zero():
    """An image model whose self-attention reads the first frame; a step of one frame, then of all."""
    parts = animatediff.build()[0].components
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    unet = small_unet()
    pipe = diffusers.TextToVideoZeroPipeline(
        **{name: parts[name] for name in names},
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"height": 40, "width": 56, "video_length": 2, "t0": 1, "t1": 2}
