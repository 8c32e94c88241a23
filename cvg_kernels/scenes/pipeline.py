"""The two pipelines of the world of scenes: put together from trained parts, loaded, and how clips are made with them.

One is `AnimateDiffPipeline` with a UNet, the other `CogVideoXPipeline` with a transformer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    UNetMotionModel,
)
from transformers import CLIPTextModel, T5EncoderModel

from cvg_kernels.errors import ArgumentError
from cvg_kernels.reading import read_object
from cvg_kernels.scenes.model import MAX_TOKENS
from cvg_kernels.shapes import pipeline as shapes
from cvg_kernels.shapes.files import load_fast_tokenizer, load_model, load_networks, load_tokenizer
from cvg_kernels.shapes.model import assemble, build_scheduler

#: The trained pipelines, `unet` and `transformer`, where the sources are at hand: they are in no wheel.
WEIGHTS = Path(__file__).with_name("weights")
#: The models in the sources, by name.
SHIPPED = ("unet", "transformer")
_KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AnimateDiffPipeline": (
        AnimateDiffPipeline,
        {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "unet": UNetMotionModel},
    ),
    "CogVideoXPipeline": (
        CogVideoXPipeline,
        {"vae": AutoencoderKLCogVideoX, "text_encoder": T5EncoderModel, "transformer": CogVideoXTransformer3DModel},
    ),
}


def assemble_run(folder: Path) -> AnimateDiffPipeline:
    """Puts the trained parts of a UNet's run together as a stock `AnimateDiffPipeline`.

    Args:
        folder: with `tokenizer/`, `vae/` and `video/`.
    """
    return assemble(
        load_model(AutoencoderKL, folder / "vae"),
        load_model(CLIPTextModel, folder / "video" / "text_encoder"),
        load_tokenizer(folder / "tokenizer"),
        load_model(UNetMotionModel, folder / "video" / "unet"),
    )


def assemble_transformer_run(folder: Path) -> CogVideoXPipeline:
    """Puts the trained parts of a transformer's run together as a stock `CogVideoXPipeline`.

    Args:
        folder: with `t5_tokenizer/`, `video_vae/` and `transformer-video-2/`.
    """
    learnt: Any = build_scheduler().config
    names = (
        "beta_start",
        "beta_end",
        "beta_schedule",
        "prediction_type",
        "clip_sample",
        "set_alpha_to_one",
        "timestep_spacing",
    )
    return CogVideoXPipeline(
        tokenizer=load_fast_tokenizer(folder / "t5_tokenizer"),
        text_encoder=load_model(T5EncoderModel, folder / "transformer-video-2" / "text_encoder"),
        vae=load_model(AutoencoderKLCogVideoX, folder / "video_vae"),
        transformer=load_model(CogVideoXTransformer3DModel, folder / "transformer-video-2" / "transformer"),
        scheduler=CogVideoXDDIMScheduler(
            **{name: learnt[name] for name in names},
            snr_shift_scale=1.0,  # noise as in training
        ),
    )


def load_pipeline(folder: str | Path | None = None, device: str | torch.device = "cpu") -> Any:
    """Loads a pipeline of this world.

    Args:
        folder: `"unet"` or `"transformer"`, which are in the sources, or a pipeline folder made by
            `cvg-kernels scenes train`; `None`: the UNet.
        device: where to put it.

    Raises:
        ArgumentError: if the folder holds no such pipeline, or weights that are not those of its networks.
    """
    folder = SHIPPED[0] if folder is None else folder
    shipped = folder in SHIPPED
    folder = WEIGHTS / folder if shipped else Path(folder)
    if shipped and not folder.exists():
        raise ArgumentError("the trained models of this world are in the sources alone; train one, or name a folder")
    if not (folder / "model_index.json").exists():
        raise ArgumentError(f"folder must hold a diffusers pipeline, got {folder} without model_index.json")
    name = read_object(folder / "model_index.json").get("_class_name")
    if name not in _KINDS:
        raise ArgumentError(f"folder must hold one of {', '.join(_KINDS)}, {folder} holds {name}")
    kind, networks = _KINDS[name]
    return load_networks(kind, folder, networks, torch.float32).to(device)


def sample(pipe: Any, prompts: list[str], seeds: list[int], **options: Any) -> torch.Tensor:
    """Makes clips `[B, F, 3, 64, 64]` in [0, 1]; a clip depends on its prompt and seed alone.

    Args:
        pipe: one of this world's pipelines.
        prompts: one a clip.
        seeds: one a clip.
        **options: options of `shapes.pipeline.sample`.
    """
    if isinstance(pipe, CogVideoXPipeline):
        options["max_sequence_length"] = MAX_TOKENS
    return shapes.sample(pipe, prompts, seeds, **options)
