"""Pipelines whose transformers come from Wan's code but have classes of their own."""

from __future__ import annotations

import functools

import diffusers

from tests.pipelines.case import pipeline
from tests.pipelines.parts import clip_of, image
from tests.pipelines.wan import CALL, IMAGE_CALL, TRANSFORMER, image_parts, parts

_case = functools.partial(pipeline, branches=("cond", "uncond"), batched=False, needs=("ftfy",))
_skyreels_case = functools.partial(_case, denoiser="SkyReelsV2Transformer3DModel")
#: Of those that take an image: its latents and a mask beside the noise, its CLIP tokens beside the text.
_IMAGE = {"in_channels": 36, "image_dim": 4, "added_kv_proj_dim": 24}


def _unipc(shift: float) -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(flow_shift=shift, use_flow_sigmas=True)


def _without(name: str) -> dict:
    return {key: value for key, value in TRANSFORMER.items() if key != name}


@_case(
    denoiser="WanAnimateTransformer3DModel",
    task="control",
    condition_channels=20,
    takes=("image", "pose_video", "face_video"),
)
def wan_animate():
    """Attends to the motion of a face, frame by frame, beside image and text."""
    transformer = diffusers.WanAnimateTransformer3DModel(
        **{**TRANSFORMER, **_IMAGE},
        latent_channels=16,
        motion_encoder_size=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ).eval()
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.WanAnimatePipeline(**image_parts(), **parts(transformer, euler))
    frames = clip_of(16, 16, 9)
    return pipe, {
        "image": image(16, 16),
        "pose_video": frames,
        "face_video": frames[::-1],
        "height": 16,
        "width": 16,
        "segment_frame_length": 9,
        "prev_segment_conditioning_frames": 1,
        "mode": "animate",
        "max_sequence_length": 512,
        "guidance_scale": 2.0,
    }


@_skyreels_case()
def skyreels_v2():
    transformer = diffusers.SkyReelsV2Transformer3DModel(**TRANSFORMER).eval()
    return diffusers.SkyReelsV2Pipeline(**parts(transformer, _unipc(8.0))), dict(CALL)


@_skyreels_case(updates=3)
def skyreels_v2_df():
    """Diffusion forcing, all frames at a time: a timestep and a scheduler for each of the three."""
    transformer = diffusers.SkyReelsV2Transformer3DModel(**TRANSFORMER).eval()
    made = parts(transformer, _unipc(8.0))
    return diffusers.SkyReelsV2DiffusionForcingPipeline(**made), dict(CALL)


@_skyreels_case(task="image-to-video", takes=("image",), condition_channels=20)
def skyreels_v2_i2v():
    transformer = diffusers.SkyReelsV2Transformer3DModel(**{**TRANSFORMER, **_IMAGE}).eval()
    made = parts(transformer, _unipc(5.0))
    return diffusers.SkyReelsV2ImageToVideoPipeline(**image_parts(), **made), dict(IMAGE_CALL)


@_case(denoiser="ChronoEditTransformer3DModel", task="image-to-video", takes=("image",), condition_channels=20)
def chronoedit():
    """An edit of an image as the last of a few frames."""
    transformer = diffusers.ChronoEditTransformer3DModel(**{**TRANSFORMER, **_IMAGE}).eval()
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.ChronoEditPipeline(**image_parts(), **parts(transformer, euler))
    return pipe, {**IMAGE_CALL, "num_frames": 5}


def _flow_map() -> diffusers.FlowMapEulerDiscreteScheduler:
    return diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)


@pipeline(denoiser="AnyFlowTransformer3DModel", branches=("cond",), channel_axis=2)
def anyflow():
    transformer = diffusers.AnyFlowTransformer3DModel(
        **_without("qk_norm"), gate_value=0.25, deltatime_type="r"
    ).eval()
    return diffusers.AnyFlowPipeline(**parts(transformer, _flow_map())), dict(CALL)


@pipeline(denoiser="AnyFlowFARTransformer3DModel", branches=("cond",), channel_axis=2, rounds=3, extra_calls=2)
def anyflow_far():
    """Frame after frame; a call after each but the last keeps its keys and values for the next."""
    transformer = diffusers.AnyFlowFARTransformer3DModel(
        **_without("qk_norm"),
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=3,
        gate_value=0.25,
        deltatime_type="r",
        chunk_partition=(1, 1, 1),
    ).eval()
    return diffusers.AnyFlowFARPipeline(**parts(transformer, _flow_map())), dict(CALL)


@_case(denoiser="HeliosTransformer3DModel")
def helios():
    """One chunk of frames behind a history that is still empty."""
    transformer = diffusers.HeliosTransformer3DModel(
        **_without("rope_max_seq_len"),
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    ).eval()
    scheduler = diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    pipe = diffusers.HeliosPipeline(**parts(transformer, scheduler))
    return pipe, {**CALL, "guidance_scale": 5.0}
