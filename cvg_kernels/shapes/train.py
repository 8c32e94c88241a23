"""`cvg-kernels shapes train`: from nothing to a pipeline folder and its editor, in resumable stages."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNetMotionModel
from transformers import CLIPTextModel

from cvg_kernels.errors import ArgumentError
from cvg_kernels.shapes.edit_stages import train_all_of_the_editor
from cvg_kernels.shapes.files import load_model, load_tokenizer, save_text_encoder
from cvg_kernels.shapes.latents import encode_shards
from cvg_kernels.shapes.model import assemble, build_tokenizer
from cvg_kernels.shapes.train_autoencoder import train_autoencoder
from cvg_kernels.shapes.train_denoiser import IMAGES, VIDEO, train_denoiser
from cvg_kernels.writing import written_folder


@dataclass(frozen=True)
class Recipe:
    """How long each stage trains. The defaults made the weights that ship."""

    autoencoder_steps: int = 2000
    clips: int = 16384
    image_steps: int = 2600
    video_steps: int = 1750
    content_steps: int = 1600
    depth_steps: int = 1600
    edit_clips: int = 4096
    prior_steps: int = 2000
    editor_steps: int = 2800
    comparison_steps: int = 0  #: of denoisers trained otherwise, for `shapes edits`; 0 trains none (reported: 700)
    seed: int = 0


def train(folder: Path, recipe: Recipe, *, device: torch.device, processes: int = 1) -> Path:
    """Trains the shapes pipeline (autoencoder, latents, image denoiser, video denoiser) and then the editor of its
    world.

    A stage whose result lies in `folder` is not repeated, and one that was cut off goes on from its last checkpoint,
    so the same call made again finishes the work. On a CPU several processes of one thread each are about twice as
    fast as one process of several threads: the networks are small.

    Args:
        folder: where everything is kept; the pipeline ends in `folder/pipeline`, the editor in
            `folder/pipeline/editor`.
        recipe: steps, clips and seed.
        device: `cpu` or a CUDA device.
        processes: how many train the denoiser together (their number is part of the recipe: the batch grows with it).

    Returns:
        The pipeline's folder, which `AnimateDiffPipeline.from_pretrained` loads.

    Raises:
        ArgumentError: if a number is not positive, or several processes are asked for on a GPU.
    """
    for name, value in (*vars(recipe).items(), ("processes", processes)):
        least = 0 if name in ("seed", "comparison_steps") else 1
        if value < least:
            raise ArgumentError(f"{name} must be {'positive' if least else '0 or more'}, got {value}")
    if processes > 1 and device.type != "cpu":
        raise ArgumentError(f"processes must be 1 on {device.type}, got {processes}")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        build_tokenizer(folder / "tokenizer")
    if not (folder / "vae").exists():
        train_autoencoder(folder, seed=recipe.seed, steps=recipe.autoencoder_steps, device=device)
    if processes == 1:
        _denoiser_stages(0, 1, folder, recipe, device)
    else:
        torch.multiprocessing.spawn(_denoiser_process, (processes, folder, recipe, device), nprocs=processes)
    pipeline = _export(folder)
    train_all_of_the_editor(folder, pipeline, recipe, device)
    return pipeline


def _denoiser_process(rank: int, processes: int, folder: Path, recipe: Recipe, device: torch.device) -> None:
    """One of several processes that train together on the CPU."""
    torch.set_num_threads(1)  # small networks: more threads in a process would mostly wait
    meeting = folder / f"processes-{os.getppid()}"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting.resolve()}", rank=rank, world_size=processes
    )
    try:
        _denoiser_stages(rank, processes, folder, recipe, device)
    finally:
        torch.distributed.destroy_process_group()


def _denoiser_stages(rank: int, processes: int, folder: Path, recipe: Recipe, device: torch.device) -> None:
    """Everything after the autoencoder, as seen by one process."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    autoencoder = load_model(AutoencoderKL, folder / "vae").eval()
    work = {"rank": rank, "processes": processes}
    for stage, steps in ((IMAGES, recipe.image_steps), (VIDEO, recipe.video_steps)):
        done = (folder / stage.name / "text_encoder").exists()
        if not done:
            encode_shards(
                folder / f"latents-{stage.name}",
                autoencoder,
                tokenizer,
                seed=recipe.seed,
                clips=recipe.clips,
                speed=stage.speed,
                **work,
            )
        if processes > 1:  # nobody reads what another process is still writing
            torch.distributed.barrier()
        if not done:
            train_denoiser(folder, tokenizer, stage, seed=recipe.seed, steps=steps, device=device, **work)
        if processes > 1:
            torch.distributed.barrier()


def _export(folder: Path) -> Path:
    """Writes the trained parts as one pipeline folder."""
    text_encoder = load_model(CLIPTextModel, folder / "video" / "text_encoder")
    pipeline = assemble(
        load_model(AutoencoderKL, folder / "vae"),
        text_encoder,
        load_tokenizer(folder / "tokenizer"),
        load_model(UNetMotionModel, folder / "video" / "unet"),
    )
    with written_folder(folder / "pipeline", keep=True) as new:
        pipeline.save_pretrained(new)
        # What the installed release writes for these two is not what others read.
        save_text_encoder(text_encoder, new / "text_encoder")
        shutil.rmtree(new / "tokenizer")
        shutil.copytree(folder / "tokenizer", new / "tokenizer")
    return folder / "pipeline"
