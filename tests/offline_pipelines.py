"""Tiny text-to-video pipelines with random weights, built without a network: the real classes of diffusers, made small.

Each builder returns a pipeline and the arguments it is called with.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

PROMPT = "a red cat and a blue dog"
#: Of every text encoder but Latte's; no grid has as many places, so that maps can be told by their shape.
TOKENS = 14
LATTE_TOKENS = 120  # fixed by its pipeline


def word_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A token a word."""
    words = ["<pad>", "<bos>", "</s>", "<unk>", "a", "red", "cat", "and", "blue", "dog", "running"]
    made = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A </s>", special_tokens=[("<bos>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="</s>",
        unk_token="<unk>", model_max_length=length,
    )  # fmt: skip


def _clip(width: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_size=width, intermediate_size=16,
            num_attention_heads=4, num_hidden_layers=2, vocab_size=32,
        )
    ).eval()  # fmt: skip


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=4)
    ).eval()


def _autoencoder(halvings: int) -> AutoencoderKL:
    blocks = halvings + 1
    return AutoencoderKL(
        block_out_channels=(8,) * blocks, down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks, latent_channels=4, norm_num_groups=2,
    )  # fmt: skip


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animatediff() -> tuple[AnimateDiffPipeline, dict[str, Any]]:
    """Latents of 5×7, so a level is rounded up to 3×4; heads of 2 numbers."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=8, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, attention_head_dim=4, norm_num_groups=2,
    )  # fmt: skip
    adapter = MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )  # fmt: skip
    pipe = AnimateDiffPipeline(
        vae=_autoencoder(3), text_encoder=_clip(8), tokenizer=word_tokenizer(TOKENS), unet=unet,
        motion_adapter=adapter, scheduler=DDIMScheduler(clip_sample=False),
    )  # fmt: skip
    return _quiet(pipe), {"height": 40, "width": 56, "num_frames": 4}


def modelscope() -> tuple[TextToVideoSDPipeline, dict[str, Any]]:
    """Two levels, double temporal self-attention; heads of 4 numbers."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=8, cross_attention_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=4, norm_num_groups=2,
    )  # fmt: skip
    pipe = TextToVideoSDPipeline(
        unet=unet, vae=_autoencoder(0), scheduler=DDIMScheduler(clip_sample=False),
        text_encoder=_clip(4), tokenizer=word_tokenizer(TOKENS),
    )  # fmt: skip
    return _quiet(pipe), {"height": 8, "width": 8, "num_frames": 4}


def wan() -> tuple[WanPipeline, dict[str, Any]]:
    """Two blocks on a 3×2×2 grid; heads of 12 numbers."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
        out_channels=16, text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    pipe = WanPipeline(
        transformer=transformer, vae=autoencoder, text_encoder=_t5(32),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), tokenizer=word_tokenizer(TOKENS),
        transformer_2=None,
    )  # fmt: skip
    return _quiet(pipe), {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": TOKENS}


def latte() -> tuple[LattePipeline, dict[str, Any]]:
    """Two spatial and two temporal blocks on a 4×4×8 grid; heads of 8 numbers; the text keeps its padding."""
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, attention_bias=True, sample_size=8, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=32, video_length=4,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for block in transformer.transformer_blocks:  # else its maps are flat: no gradient
            block.attn2.to_q.weight.mul_(10)
            block.attn2.to_k.weight.mul_(10)
    pipe = LattePipeline(
        transformer=transformer, vae=_autoencoder(0), text_encoder=_t5(32),
        scheduler=DDIMScheduler(clip_sample=False), tokenizer=word_tokenizer(TOKENS),
    )  # fmt: skip
    options = {"height": 8, "width": 16, "video_length": 4, "clean_caption": False}
    return _quiet(pipe), {**options, "mask_feature": False}


def cogvideox(patch_size_t: int | None = None) -> tuple[CogVideoXPipeline, dict[str, Any]]:
    """Two blocks on a 3×2×3 grid with rotary positions; heads of 16 numbers. `patch_size_t=2`: as CogVideoX 1.5."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 3, down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3, latent_channels=4, layers_per_block=1,
        norm_num_groups=2,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=4, text_embed_dim=32, num_layers=2, sample_width=6, sample_height=4,
        sample_frames=9, patch_size_t=patch_size_t, patch_bias=patch_size_t is None,
        max_text_seq_length=TOKENS, use_rotary_positional_embeddings=True,
    ).eval()  # fmt: skip
    pipe = CogVideoXPipeline(
        transformer=transformer, vae=autoencoder, text_encoder=_t5(32),
        scheduler=CogVideoXDDIMScheduler(), tokenizer=word_tokenizer(TOKENS),
    )  # fmt: skip
    return _quiet(pipe), {"height": 16, "width": 24, "num_frames": 9, "max_sequence_length": TOKENS}


BUILDERS = {
    "animatediff": animatediff,
    "modelscope": modelscope,
    "latte": latte,
    "wan": wan,
    "cogvideox": cogvideox,
}

#: Frames, rows and columns of each one's latents.
LATENTS = {
    "animatediff": (4, 5, 7),
    "modelscope": (4, 8, 8),
    "latte": (4, 8, 16),
    "wan": (3, 4, 4),
    "cogvideox": (3, 4, 6),
}


def noise(name: str, pipe: Any, samples: int) -> torch.Tensor:
    """Random latents for a pipeline, its axes in its order."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    made = torch.randn(samples, denoiser.config.in_channels, *LATENTS[name])
    return made.transpose(1, 2) if name == "cogvideox" else made


def run(pipe: Any, options: dict[str, Any], prompt: Any = PROMPT, **changes: Any) -> torch.Tensor:
    """A short call from fixed noise; frames as a tensor."""
    settings = {"num_inference_steps": 3, "output_type": "pt", **options, **changes}
    if prompt is not None:
        settings["prompt"] = prompt
    return pipe(generator=torch.Generator().manual_seed(0), **settings).frames
