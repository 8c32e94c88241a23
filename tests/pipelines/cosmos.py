"""Cosmos 1, 2 and 2.5: guidance in separate calls;
all end in latents, for the decoded frames are rounded to 8 bits.
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch

from tests.pipelines.case import pipeline
from tests.pipelines.parts import TOKENS, image, qwen, t5, t5_tokenizer, wan_autoencoder, word_tokenizer

_case = functools.partial(pipeline, denoiser="CosmosTransformer3DModel", branches=("cond", "uncond"), batched=False)
_CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "max_sequence_length": TOKENS,
    "output_type": "latent",
    "negative_prompt": "running",
}


class _NoGuardrail:
    """Stands for the guardrail, whose models are large."""

    def to(self, *_, **__):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


class _NoTorchvision:
    """Stands for `torchvision.transforms`, of which the transformer needs one function: it resizes a mask."""

    class InterpolationMode:
        NEAREST = "nearest"

    class functional:
        @staticmethod
        def resize(x, size, interpolation="nearest"):
            return torch.nn.functional.interpolate(x, size, mode=interpolation)


def _transformer(channels: int, out: int, **changes: Any) -> diffusers.CosmosTransformer3DModel:
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        transformer_cosmos.transforms = _NoTorchvision
    return diffusers.CosmosTransformer3DModel(
        in_channels=channels,
        out_channels=out,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=True,
        extra_pos_embed_type="learnable",
        **changes,
    ).eval()


def _parts() -> dict[str, Any]:
    return {"text_encoder": t5(32), "tokenizer": t5_tokenizer(), "safety_checker": _NoGuardrail()}


@_case(updates=2)
def cosmos():
    """Steps once for the sample of the next step, once more for its guided estimate."""
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        patch_type="haar",
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ).eval()
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        rho=7.0,
        num_train_timesteps=1000,
        prediction_type="epsilon",
        final_sigmas_type="sigma_min",
    )
    pipe = diffusers.CosmosTextToWorldPipeline(
        transformer=_transformer(4, 4), vae=vae, scheduler=scheduler, **_parts()
    )
    return pipe, dict(_CALL)


@_case(task="image-to-video", takes=("image",))
def cosmos2_video2world():
    pipe = diffusers.Cosmos2VideoToWorldPipeline(
        transformer=_transformer(17, 16),
        vae=wan_autoencoder(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        **_parts(),
    )
    return pipe, {**_CALL, "image": image(32, 32)}


@_case()
def cosmos2_5():
    """All hidden states of the text encoder side by side; the tokens of the chat template stay in the text."""
    transformer = _transformer(
        17, 16, use_crossattn_projection=True, crossattn_proj_in_channels=64, encoder_hidden_states_channels=32
    )
    pipe = diffusers.Cosmos2_5_PredictBasePipeline(
        transformer=transformer,
        vae=wan_autoencoder(),
        text_encoder=qwen(32),
        tokenizer=word_tokenizer(2000, bos=False, eos=False, chat=True),
        scheduler=diffusers.UniPCMultistepScheduler(),
        safety_checker=_NoGuardrail(),
    )
    return pipe, {**_CALL, "max_sequence_length": 32}
