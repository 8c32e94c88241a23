"""Transformers that have little in common."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
import transformers

from tests.pipelines.case import pipeline
from tests.pipelines.parts import (
    IDS,
    TOKENS,
    clip,
    image,
    qwen,
    rope,
    t5,
    t5_tokenizer,
    wan_autoencoder,
    word_tokenizer,
)

_SEPARATE = {"branches": ("cond", "uncond"), "batched": False}
_FRAMES9 = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": TOKENS}


_ltx_case = functools.partial(pipeline, denoiser="LTXVideoTransformer3DModel", channel_axis=-1)


def _ltx_parts() -> dict[str, Any]:
    """Latents packed to a sequence of tokens."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ).eval()
    halved = (True, True, False, False)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=halved,
        decoder_spatio_temporal_scaling=halved,
        decoder_inject_noise=(False,) * 5,
        patch_size=1,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return {
        "transformer": transformer,
        "vae": vae,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "text_encoder": t5(32),
        "tokenizer": t5_tokenizer(),
    }


@_ltx_case()
def ltx():
    return diffusers.LTXPipeline(**_ltx_parts()), dict(_FRAMES9)


@_ltx_case(task="image-to-video", takes=("image",))
def ltx_i2v():
    pipe = diffusers.LTXImageToVideoPipeline(**_ltx_parts())
    return pipe, {**_FRAMES9, "image": image(32, 32)}


@_ltx_case(task="image-to-video", takes=("image",))
def ltx_condition():
    pipe = diffusers.LTXConditionPipeline(**_ltx_parts())
    given = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return pipe, {**_FRAMES9, "image": given}


@pipeline(denoiser="MochiTransformer3DModel")
def mochi():
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        in_channels=12,
        pooled_projection_dim=16,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    ).eval()
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    ).eval()
    pipe = diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5(32),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )
    return pipe, {**_FRAMES9, "num_frames": 7}


@pipeline(denoiser="AllegroTransformer3DModel")
def allegro():
    """Ends in latents: the tiny decoder's tiles are constant."""
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    ).eval()
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    vae.enable_tiling()
    pipe = diffusers.AllegroPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(24),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(),
    )
    size = {"height": 32, "width": 48, "num_frames": 8, "max_sequence_length": TOKENS}
    return pipe, {**size, "clean_caption": False, "output_type": "latent"}


@pipeline(denoiser="EasyAnimateTransformer3DModel")
def easyanimate():
    """The tokens of a chat template stay in the text."""
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    ).eval()
    kind = "SpatialTemporal{}Block3D"
    vae = diffusers.AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", *(kind.format("Down"),) * 3),
        up_block_types=("SpatialUpBlock3D", *(kind.format("Up"),) * 3),
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    ).eval()
    text = dict(
        **IDS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling=rope(1, 1, 2),
    )
    config = transformers.Qwen2VLConfig(
        text_config=text,
        image_token_id=28,
        video_token_id=27,
        vision_start_token_id=30,
        vision_end_token_id=31,
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
    )
    pipe = diffusers.EasyAnimatePipeline(
        vae=vae,
        text_encoder=transformers.Qwen2VLForConditionalGeneration(config).eval(),
        tokenizer=word_tokenizer(64, bos=False, eos=False, chat=True),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    return pipe, {"height": 16, "width": 16, "num_frames": 5, "negative_prompt": ""}


class _TextProcessor(transformers.ProcessorMixin):
    """Stands for a processor of text and images where only text goes in: calls its tokenizer."""

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer, **_):
        self.tokenizer = tokenizer
        self.chat_template = None

    def __call__(self, text=None, images=None, videos=None, **options):
        return self.tokenizer(text, **options)

    def decode(self, *args, **options):
        return self.tokenizer.decode(*args, **options)


@pipeline(denoiser="Kandinsky5Transformer3DModel", channel_axis=-1, **_SEPARATE)
def kandinsky5():
    """Channels last."""
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        in_text_dim=32,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=16,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(1, 1, 2),
        visual_cond=False,
        attention_type="regular",
    ).eval()
    with torch.no_grad():  # its modulation begins at zero: then no gradient reaches the latents
        for name, parameter in transformer.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.2)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=[8, 8],
        down_block_types=["HunyuanVideoDownBlock3D"] * 2,
        latent_channels=16,
        layers_per_block=1,
        mid_block_add_attention=False,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        up_block_types=["HunyuanVideoUpBlock3D"] * 2,
    ).eval()
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=qwen(32),
        text_encoder_2=clip(8),
        tokenizer=_TextProcessor(word_tokenizer(512, bos=False, eos=False)),
        tokenizer_2=word_tokenizer(77),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    pipe.prompt_template = "<|im_start|> system describe the video <|im_end|> <|im_start|> user {} <|im_end|>"
    pipe.prompt_template_encode_start_idx = 8
    return pipe, {**_FRAMES9, "num_frames": 5}


@pipeline(denoiser="SanaVideoTransformer3DModel")
def sana_video():
    """Self-attention is linear."""
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        mlp_ratio=2.5,
        dropout=0.0,
        attention_bias=False,
        sample_size=8,
        patch_size=(1, 2, 2),
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    gemma = transformers.Gemma2Config(
        **IDS,
        head_dim=16,
        hidden_size=8,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    pipe = diffusers.SanaVideoPipeline(
        tokenizer=word_tokenizer(300, eos=False),
        vae=wan_autoencoder(),
        transformer=transformer,
        text_encoder=transformers.Gemma2Model(gemma).eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    return pipe, {
        "height": 32,
        "width": 32,
        "frames": 9,
        "max_sequence_length": TOKENS,
        "complex_human_instruction": [],
        "use_resolution_binning": False,
        "clean_caption": False,
    }


@pipeline(denoiser="SanaVideoTransformer3DModel")
def sana_video_instruction():
    """With an instruction before the prompt, as released: only the end of its tokens is kept."""
    pipe, options = sana_video.build()
    return pipe, {**options, "complex_human_instruction": ["describe the video user "]}


@pipeline(denoiser="MotifVideoTransformer3DModel", condition_channels=17, **_SEPARATE)
def motif_video():
    """Channels for an image that is not given."""
    from transformers.models.t5gemma2 import T5Gemma2Encoder, T5Gemma2EncoderConfig, T5Gemma2TextConfig

    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        mlp_ratio=4.0,
        patch_size=1,
        patch_size_t=1,
        qk_norm="rms_norm",
        text_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
    ).eval()
    config = T5Gemma2TextConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=128,
        head_dim=16,
        num_key_value_heads=2,
        dropout_rate=0.0,
    )
    pipe = diffusers.MotifVideoPipeline(
        transformer=transformer,
        vae=wan_autoencoder(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        tokenizer=t5_tokenizer(),
        text_encoder=T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=config)).eval(),
        feature_extractor=None,
        guider=diffusers.AdaptiveProjectedGuidance(),
    )
    return pipe, {**_FRAMES9, "height": 16, "width": 16}
