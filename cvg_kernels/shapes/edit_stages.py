"""The stages of `shapes train` that make the editor, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import PriorTransformer, UNetMotionModel
from transformers import CLIPModel, DepthAnythingForDepthEstimation

from cvg_kernels.editing import StructureContentPipeline
from cvg_kernels.errors import ArgumentError
from cvg_kernels.shapes.edit_latents import encode_edit_clips
from cvg_kernels.shapes.files import load_model, save_model
from cvg_kernels.shapes.pipeline import load_pipeline
from cvg_kernels.shapes.train_content import train_content_encoder
from cvg_kernels.shapes.train_depth import train_depth_estimator
from cvg_kernels.shapes.train_editor import train_editor
from cvg_kernels.shapes.train_prior import build_prior_scheduler, train_prior
from cvg_kernels.writing import written_folder


def train_all_of_the_editor(folder: Path, pipeline: Path, recipe: Any, device: torch.device) -> Path:
    """Trains content encoder, depth network, prior and denoiser of the editor, and puts them together.

    A stage whose result lies in `folder` is not repeated. What is trained to be compared, if it is asked for: a
    diffusion prior, and the denoiser for fewer steps, on images and video together as the editor's own and on video
    alone.

    Args:
        folder: folder of the run.
        pipeline: folder of the trained shapes pipeline.
        recipe: steps, clips and seed, a `train.Recipe`.
        device: where to train.

    Returns:
        The editor's folder, in that of the pipeline.
    """
    how: dict[str, Any] = {"seed": recipe.seed, "device": device}
    world = load_pipeline(pipeline)
    if not (folder / "content_encoder").exists():
        train_content_encoder(folder, world.tokenizer, steps=recipe.content_steps, **how)
    if not (folder / "depth_estimator").exists():
        train_depth_estimator(folder, steps=recipe.depth_steps, **how)
    world.content_encoder = load_model(CLIPModel, folder / "content_encoder").eval()
    world.depth_estimator = load_model(DepthAnythingForDepthEstimation, folder / "depth_estimator").eval()
    encode_edit_clips(folder / "edit-clips", world, seed=recipe.seed, clips=recipe.edit_clips)
    if not (folder / "prior").exists():
        train_prior(folder, world.content_encoder, steps=recipe.prior_steps, **how)
    if not (folder / "editor-unet").exists():
        train_editor(folder, world, steps=recipe.editor_steps, **how)
    if recipe.comparison_steps:
        if not (folder / "diffusion-prior").exists():
            encoder = world.content_encoder
            train_prior(folder, encoder, steps=recipe.prior_steps, diffusion=True, **how)
        for name, options in (("joint", {}), ("video", {"images": 0.0})):
            stage = f"ablation-{name}"
            if not (folder / f"{stage}-unet").exists():
                train_editor(folder, world, steps=recipe.comparison_steps, name=stage, **options, **how)
    return export_editor(folder, pipeline)


def trained_otherwise(folder: Path) -> dict[str, Any]:
    """Loads what a run has trained to be compared with the editor's own: a diffusion prior, and denoisers.

    Args:
        folder: folder of the run; `diffusion-prior/` and each `ablation-<name>-unet/` in it are taken.

    Returns:
        `diffusion_prior`, its `prior_scheduler`, and `denoisers` by name.

    Raises:
        ArgumentError: if there is nothing of the kind.
    """
    found: dict[str, Any] = {}
    if (folder / "diffusion-prior").exists():
        found["diffusion_prior"] = load_model(PriorTransformer, folder / "diffusion-prior").eval()
        found["prior_scheduler"] = build_prior_scheduler()
    places = sorted(folder.glob("ablation-*-unet"))
    if places:
        found["denoisers"] = {
            place.name.removeprefix("ablation-").removesuffix("-unet"): load_model(UNetMotionModel, place).eval()
            for place in places
        }
    if not found:
        raise ArgumentError(f"training run must hold diffusion-prior or ablation-*-unet, got {folder}")
    return found


def export_editor(folder: Path, pipeline: Path, name: str = "editor") -> Path:
    """Writes the trained networks of the editor as float16 into the folder of the shapes pipeline, which has the
    others.

    Args:
        folder: folder of the run.
        pipeline: folder of the shapes pipeline.
        name: name of the stage that trained the denoiser.
    """
    own = {
        "unet": (UNetMotionModel, folder / f"{name}-unet"),
        "content_encoder": (CLIPModel, folder / "content_encoder"),
        "prior": (PriorTransformer, folder / "prior"),
        "depth_estimator": (DepthAnythingForDepthEstimation, folder / "depth_estimator"),
    }
    world = load_pipeline(pipeline)
    editor = StructureContentPipeline(
        vae=world.vae,
        text_encoder=world.text_encoder,
        tokenizer=world.tokenizer,
        scheduler=world.scheduler,
        **{part: load_model(kind, place) for part, (kind, place) in own.items()},
    )
    to = pipeline / "editor"
    with written_folder(to) as new:
        editor.save_config(new)  # which components there are
        editor.scheduler.save_pretrained(new / "scheduler")
        for part in own:
            save_model(torch.nn.Module.half(getattr(editor, part)), new / part)
    return to
