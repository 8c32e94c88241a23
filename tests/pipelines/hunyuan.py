"""HunyuanVideo and its relatives: text and video in one sequence, the text last; guidance an input or by separate
calls.
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import transformers

from tests.pipelines.case import pipeline
from tests.pipelines.parts import IDS, IMAGE_TOKEN, clip, clip_processor, image, rope, t5, word_tokenizer

#: One evaluation a step: the guidance scale is an input of the denoiser.
_case = functools.partial(pipeline, denoiser="HunyuanVideoTransformer3DModel", branches=("cond",))

_TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}
_LLAMA = dict(**IDS, hidden_size=16, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3)
#: The beginning mark and six words before the prompt, which the pipeline cuts off again.
_TEMPLATE = {"template": "<|im_start|> system describe the video <|im_end|> {} <|im_end|>", "crop_start": 7}
_CALL = {"height": 16, "width": 32, "num_frames": 9, "max_sequence_length": 16, "prompt_template": _TEMPLATE}


def _parts(transformer: Any = None, **changes: Any) -> dict[str, Any]:
    if transformer is None:
        transformer = diffusers.HunyuanVideoTransformer3DModel(**{**_TRANSFORMER, **changes})
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    ).eval()
    return {
        "transformer": transformer.eval(),
        "vae": vae,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": transformers.LlamaModel(transformers.LlamaConfig(**_LLAMA)).eval(),
        "tokenizer": word_tokenizer(256, eos=False),
        "text_encoder_2": clip(8),
        "tokenizer_2": word_tokenizer(77),
    }


@_case()
def hunyuan_video():
    return diffusers.HunyuanVideoPipeline(**_parts()), dict(_CALL)


@_case(branches=("cond", "uncond"), batched=False)
def hunyuan_video_true_cfg():
    """With a negative prompt, which is encoded in a call of its own, the last."""
    pipe, options = hunyuan_video.build()
    return pipe, {**options, "true_cfg_scale": 4.0, "negative_prompt": "running"}


@_case(task="image-to-video", takes=("image",), condition_channels=4)
def hunyuan_skyreels_i2v():
    pipe = diffusers.HunyuanSkyreelsImageToVideoPipeline(**_parts(in_channels=8))
    return pipe, {**_CALL, "image": image(32, 16)}


@_case(task="image-to-video", takes=("image",), condition_channels=5)
def hunyuan_video_i2v():
    """The image's tokens stand before the words in the text sequence; its latents and a mask beside the noise."""
    return _image_to_video(in_channels=9, image_condition_type="latent_concat")


def token_replaced():
    """The same, the image in the place of the first frame."""
    return _image_to_video(image_condition_type="token_replace")


def _image_to_video(**changes: Any) -> tuple[Any, dict[str, Any]]:
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=37,
        projection_dim=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=32,
        patch_size=16,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_LLAMA),
        pad_token_id=0,
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
    )
    parts = _parts(guidance_embeds=False, **changes)
    parts["text_encoder"] = transformers.LlavaForConditionalGeneration(config).eval()
    pipe = diffusers.HunyuanVideoImageToVideoPipeline(image_processor=clip_processor(), **parts)
    template = {
        "template": "<|start_header_id|> system <|end_header_id|> <image> describe <|im_end|> <|start_header_id|> "
        "user <|end_header_id|> {} <|im_end|> <|start_header_id|> assistant <|end_header_id|>",
        "crop_start": 10,
        "image_emb_len": 4,
        "image_emb_start": 4,
        "image_emb_end": 8,
    }
    options = {"image": image(32, 16), "prompt_template": template, "max_sequence_length": 32}
    return pipe, {**_CALL, **options}


@_case(denoiser="HunyuanVideoFramepackTransformer3DModel", task="image-to-video", takes=("image",))
def framepack():
    """Earlier frames and the image's tokens stand before the text."""
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **{**_TRANSFORMER, "patch_size": 2},
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=32,
        has_clean_x_embedder=True,
    )
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )
    pil = getattr(transformers, "SiglipImageProcessorPil", None)  # works without torchvision
    extractor = (pil or transformers.SiglipImageProcessor)(size={"height": 32, "width": 32})
    pipe = diffusers.HunyuanVideoFramepackPipeline(
        image_encoder=transformers.SiglipVisionModel(config).eval(), feature_extractor=extractor, **_parts(transformer)
    )
    return pipe, {**_CALL, "image": image(32, 32), "height": 32, "latent_window_size": 3}


@pipeline(
    denoiser="HunyuanVideo15Transformer3DModel", branches=("cond", "uncond"), batched=False, condition_channels=5
)
def hunyuan_video15():
    """Two text encoders side by side, their valid tokens first; channels for an image that is not given."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    ).eval()
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()
    qwen = transformers.Qwen2_5_VLTextConfig(
        **IDS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_theta=1e6,
        rope_scaling=rope(1, 1, 2),
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=vae,
        text_encoder_2=t5(32, vocabulary=400),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=transformers.Qwen2_5_VLTextModel(qwen).eval(),
        tokenizer=word_tokenizer(2000, bos=False, eos=False, chat=True),
        tokenizer_2=transformers.ByT5Tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    )
    pipe.system_message = "describe the video"
    # <|im_start|> system describe the video <|im_end|> <|im_start|> user
    pipe.prompt_template_encode_start_idx = 8
    pipe.tokenizer_max_length = 20
    pipe.tokenizer_2_max_length = 6
    pipe.vision_num_semantic_tokens = 5
    return pipe, {"height": 16, "width": 16, "num_frames": 9}
