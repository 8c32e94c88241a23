"""Wan and what diffusers builds on its transformer: no temporal layers, a call of the denoiser for each branch."""

from __future__ import annotations

import functools
from typing import Any

import diffusers

from tests.pipelines.case import pipeline
from tests.pipelines.parts import (
    TOKENS,
    clip_of,
    clip_processor,
    clip_vision,
    image,
    t5,
    t5_tokenizer,
    wan_autoencoder,
    word_tokenizer,
)

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
CALL = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": TOKENS}
#: The transformer finds the image's tokens by counting 512 of text from the end.
IMAGE_CALL = {**CALL, "image": image(32, 32), "max_sequence_length": 512}

wan_case = functools.partial(
    pipeline, denoiser="WanTransformer3DModel", branches=("cond", "uncond"), batched=False, latents=(3, 4, 4)
)
#: Those whose pipelines clean the prompt with ftfy and do not ask whether it is there.
ftfy_case = functools.partial(wan_case, needs=("ftfy",))


def _transformer(**changes: Any) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(**{**TRANSFORMER, **changes}).eval()


def parts(transformer: Any = None, scheduler: Any = None) -> dict[str, Any]:
    return {
        "vae": wan_autoencoder(),
        "transformer": transformer or _transformer(),
        "text_encoder": t5(32),
        "tokenizer": t5_tokenizer(),
        "scheduler": scheduler or _unipc(),
    }


def _unipc() -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def image_parts() -> dict[str, Any]:
    return {"image_encoder": clip_vision(4), "image_processor": clip_processor()}


@wan_case()
def wan():
    """Two blocks on a 3×2×2 grid; heads of 12 numbers; Euler steps."""
    vae = wan_autoencoder()
    pipe = diffusers.WanPipeline(
        vae=vae,
        transformer=diffusers.WanTransformer3DModel(**TRANSFORMER),
        text_encoder=t5(32),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        tokenizer=word_tokenizer(TOKENS),
    )
    return pipe, dict(CALL)


@wan_case(experts=2)
def wan22():
    """Two experts: the boundary lies between the steps."""
    pipe = diffusers.WanPipeline(transformer_2=_transformer(), boundary_ratio=0.875, **parts())
    return pipe, dict(CALL)


@wan_case()
def wan22_ti2v():
    """Wan 2.2 5B, text to video: a timestep for each token."""
    return diffusers.WanPipeline(transformer_2=None, expand_timesteps=True, **parts()), dict(CALL)


@ftfy_case(task="image-to-video", takes=("image",))
def wan22_ti2v_image():
    """Wan 2.2 5B, image to video: the tokens of the first frame have timestep 0."""
    pipe = diffusers.WanImageToVideoPipeline(
        transformer_2=None, image_encoder=None, image_processor=None, expand_timesteps=True, **parts()
    )
    return pipe, {**CALL, "image": image(32, 32)}


@ftfy_case(task="image-to-video", takes=("image",), condition_channels=20)
def wan_i2v():
    """Wan 2.1: each cross layer attends to the image's 17 CLIP tokens, then to the text."""
    transformer = _transformer(in_channels=36, image_dim=4, added_kv_proj_dim=24)
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.WanImageToVideoPipeline(transformer_2=None, **image_parts(), **parts(transformer, euler))
    return pipe, dict(IMAGE_CALL)


@ftfy_case(task="image-to-video", takes=("image",), condition_channels=20, experts=2)
def wan22_i2v():
    """Wan 2.2 14B: two experts, no image encoder."""
    pipe = diffusers.WanImageToVideoPipeline(
        transformer_2=_transformer(in_channels=36),
        image_encoder=None,
        image_processor=None,
        boundary_ratio=0.875,
        **parts(_transformer(in_channels=36)),
    )
    return pipe, {**CALL, "image": image(32, 32)}


@ftfy_case(task="video-to-video", takes=("video",), strength=0.7)
def wan_v2v():
    pipe = diffusers.WanVideoToVideoPipeline(**parts())
    options = {name: value for name, value in CALL.items() if name != "num_frames"}
    options |= {"video": clip_of(32, 32, 9), "strength": 0.7, "num_inference_steps": 5}
    return pipe, options


@ftfy_case(denoiser="WanVACETransformer3DModel", task="control", takes=("video", "mask"))
def wan_vace():
    """Blocks of their own for the control, with cross-attention to the text."""
    transformer = diffusers.WanVACETransformer3DModel(
        **{**TRANSFORMER, "num_layers": 3}, vace_layers=[0, 2], vace_in_channels=96
    ).eval()
    pipe = diffusers.WanVACEPipeline(transformer_2=None, **parts(transformer))
    return pipe, {**CALL, "video": clip_of(32, 32, 9), "mask": clip_of(32, 32, 9, "L")}


@ftfy_case(task="video-to-video", takes=("video",), condition_channels=16)
def lucy():
    """Lucy Edit: the source video's latents beside the noise, all of the schedule."""
    pipe = diffusers.LucyEditPipeline(transformer_2=None, expand_timesteps=True, **parts(_transformer(in_channels=32)))
    return pipe, {**CALL, "video": clip_of(32, 32, 9)}


@ftfy_case()
def wan_modular():
    """The pipeline `wan` as a modular one: a guider, and no `encode_prompt`."""
    pipe, options = wan.build()
    modular = diffusers.WanBlocks().init_pipeline()
    names = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    modular.update_components(**{name: getattr(pipe, name) for name in names})
    return modular, options


class _HouseTransformer(diffusers.WanTransformer3DModel):
    """A class of somebody's own."""


@wan_case()
def wan_subclass():
    pipe, options = wan.build()
    pipe.transformer.__class__ = _HouseTransformer
    return pipe, options


@wan_case()
def wan_fsdp():
    """The class that `fully_shard` gives a module, without its processes."""
    from torch.distributed.fsdp import FSDPModule

    pipe, options = wan.build()
    kind = type(pipe.transformer)
    pipe.transformer.__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, kind), {})
    return pipe, options


@wan_case(needs=("peft",))
def wan_peft():
    """A low-rank adapter around the transformer."""
    from peft import LoraConfig, get_peft_model

    pipe, options = wan.build()
    config = LoraConfig(target_modules=["to_q", "to_v"], r=2, init_lora_weights=False)
    pipe.transformer = get_peft_model(pipe.transformer, config)
    return pipe, options
