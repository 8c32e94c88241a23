"""LTX 2: video and audio at once, latents packed to a sequence of tokens, text padded on the left."""

from __future__ import annotations

import diffusers
import transformers

from tests.pipelines.case import pipeline
from tests.pipelines.parts import IDS, IMAGE_TOKEN, TOKENS, word_tokenizer


def _text_encoder() -> transformers.Gemma3ForConditionalGeneration:
    text = dict(
        **IDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=64,
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=28,
        eoi_token_index=29,
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def _autoencoders() -> dict[str, object]:
    video = diffusers.AutoencoderKLLTX2Video(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    video.use_framewise_encoding = video.use_framewise_decoding = False
    audio = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        dropout=0.0,
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    ).eval()
    return {"vae": video, "audio_vae": audio}


@pipeline(denoiser="LTX2VideoTransformer3DModel", channel_axis=-1, updates=2)
def ltx2():
    """A step updates the video, then the audio."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    ).eval()
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    ).eval()
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        leaky_relu_negative_slope=0.1,
        output_sampling_rate=16000,
    ).eval()
    pipe = diffusers.LTX2Pipeline(
        **_autoencoders(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=_text_encoder(),
        tokenizer=word_tokenizer(TOKENS, eos=False, side="left"),
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
        processor=None,
    )
    call = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": TOKENS}
    # No guidance by skipped blocks and none between video and audio: two branches.
    off = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
    on = {"guidance_scale": 3.0, "guidance_rescale": 0.0, "audio_guidance_scale": 1.0}
    return pipe, {**call, **off, **on, "frame_rate": 25.0}
