"""`cvg-kernels scenes train`: from nothing to a pipeline folder, in resumable stages."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from cvg_kernels.errors import ArgumentError
from cvg_kernels.reading import read_object
from cvg_kernels.scenes.latents import captions_of, encode_shards
from cvg_kernels.scenes.model import build_tokenizer
from cvg_kernels.scenes.pipeline import assemble_run, assemble_transformer_run
from cvg_kernels.scenes.train_autoencoder import train_autoencoder, train_decoder
from cvg_kernels.scenes.train_denoiser import IMAGES, VIDEO, Stage, train_denoiser
from cvg_kernels.scenes.train_transformer import CLIPS, PICTURES, train_transformer
from cvg_kernels.scenes.transformer import build_t5_tokenizer
from cvg_kernels.scenes.video_autoencoder import train_video_autoencoder
from cvg_kernels.shapes.files import load_fast_tokenizer, load_model, load_tokenizer, save_text_encoder
from cvg_kernels.shapes.latents import load_shards
from cvg_kernels.writing import write_json, written_folder


@dataclass(frozen=True)
class Recipe:
    """How long each stage trains."""

    autoencoder_steps: int = 1800
    image_cycles: int = 2  # of the learning rate, each with pictures of its own
    pictures: int = 24576  # of a cycle
    image_steps: int = 2600  # of a cycle
    clips: int = 12288
    video_steps: int = 2400
    decoder_steps: int = 2400
    transformer_image_steps: int = 2400  # of each of two cycles, on all pictures
    transformer_video_steps: int = 1200
    transformer_video_steps_2: int = 2400  # of a second cycle
    video_autoencoder_steps: int = 600
    seed: int = 0


def train(folder: Path, recipe: Recipe, *, device: torch.device, processes: int = 1, network: str = "unet") -> Path:
    """Trains a pipeline of this world: autoencoder, denoiser of pictures, of clips, and the decoder once more.

    A stage whose result lies in `folder` is not repeated, and one that was cut off goes on from its last checkpoint,
    so the same call made again finishes the work.

    Args:
        folder: where everything is kept; the pipeline ends in `folder/pipeline`.
        recipe: steps, pictures, clips and seed.
        device: `cpu` or a CUDA device.
        processes: how many train the denoiser together (their number is part of the recipe: the batch grows with it).
        network: `"unet"`; or `"transformer"`, which learns from the latents of the same autoencoder and ends in
            `folder/transformer-pipeline`. It is trained by one process.

    Returns:
        The pipeline's folder, which `AnimateDiffPipeline.from_pretrained` loads, or `CogVideoXPipeline`'s.

    Raises:
        ArgumentError: if a number is not positive, the network is none of the two, or several processes are asked for
            on a GPU.
    """
    if network not in ("unet", "transformer"):
        raise ArgumentError(f"network must be 'unet' or 'transformer', got {network!r}")
    for name, value in (*vars(recipe).items(), ("processes", processes)):
        least = 0 if name == "seed" else 1
        if value < least:
            raise ArgumentError(f"{name} must be {'positive' if least else '0 or more'}, got {value}")
    if processes > 1 and device.type != "cpu":
        raise ArgumentError(f"processes must be 1 on {device.type}, got {processes}")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        build_tokenizer(folder / "tokenizer")
    if not (folder / "autoencoder").exists():
        train_autoencoder(folder, seed=recipe.seed, steps=recipe.autoencoder_steps, device=device)
    if network == "transformer":
        _transformer_stages(folder, recipe, device)
    elif processes == 1:
        _denoiser_stages(0, 1, folder, recipe, device)
    else:
        torch.multiprocessing.spawn(_denoiser_process, (processes, folder, recipe, device), nprocs=processes)
    if not (folder / "vae").exists():
        train_decoder(folder, seed=recipe.seed, steps=recipe.decoder_steps, device=device)
    if network == "transformer":
        if not (folder / "video_vae").exists():
            train_video_autoencoder(folder, seed=recipe.seed, steps=recipe.video_autoencoder_steps, device=device)
        return _export_transformer(folder)
    return _export(folder)


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
    """Both denoisers, as seen by one process."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    autoencoder = load_model(AutoencoderKL, folder / "autoencoder").eval()
    work = {"rank": rank, "processes": processes, "seed": recipe.seed}
    before = None
    for name, stage, first, clips, steps in _cycles(recipe):
        done = (folder / name / "text_encoder").exists()
        if not done:
            encode_shards(
                folder / f"latents-{name}",
                autoencoder,
                tokenizer,
                clips=clips,
                first=first,
                whole=stage is VIDEO,
                **work,
            )
        if processes > 1:  # nobody reads what another process is still writing
            torch.distributed.barrier()
        if not done:
            train_denoiser(folder, tokenizer, stage, name=name, before=before, steps=steps, device=device, **work)
        if processes > 1:
            torch.distributed.barrier()
        before = folder / name


def _cycles(recipe: Recipe) -> list[tuple[str, Stage, int, int, int]]:
    """What is trained in turn: name, stage, number of its first clip, clips, steps."""
    images = [
        (f"images-{number + 1}", IMAGES, number * recipe.pictures, recipe.pictures, recipe.image_steps)
        for number in range(recipe.image_cycles)
    ]
    return [*images, ("video", VIDEO, 0, recipe.clips, recipe.video_steps)]


def _transformer_stages(folder: Path, recipe: Recipe, device: torch.device) -> None:
    """The transformer, in two cycles on the pictures of both of the UNet's, and then in two on the clips."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    autoencoder = load_model(AutoencoderKL, folder / "autoencoder").eval()
    if not (folder / "t5_tokenizer").exists():
        build_t5_tokenizer(folder / "t5_tokenizer")
    words = load_fast_tokenizer(folder / "t5_tokenizer")
    before = None
    of_pictures = [(stage, recipe.transformer_image_steps) for stage in PICTURES]
    of_clips = zip(CLIPS, (recipe.transformer_video_steps, recipe.transformer_video_steps_2), strict=True)
    for stage, steps in (*of_pictures, *of_clips):
        if not (folder / stage.name / "text_encoder").exists():
            whole = stage in CLIPS
            latents, captions = [], []
            for name, of, first, clips, _ in _cycles(recipe):
                if (of is VIDEO) != whole:
                    continue
                drawn = {"seed": recipe.seed, "first": first, "clips": clips, "whole": whole}
                encode_shards(folder / f"latents-{name}", autoencoder, tokenizer, **drawn)
                latents.append(load_shards(folder / f"latents-{name}")[0])
                captions += captions_of(**drawn)
            all_latents = torch.cat(latents)
            all_latents = all_latents.transpose(1, 2) if whole else all_latents[:, 0]
            work = {"before": before, "seed": recipe.seed, "steps": steps, "device": device}
            train_transformer(folder, words, stage, all_latents, captions, **work)
        before = folder / stage.name


def _export_transformer(folder: Path) -> Path:
    """Writes the trained parts as one pipeline folder, the weights in 16 bits."""
    pipeline = assemble_transformer_run(folder)
    with written_folder(folder / "transformer-pipeline", keep=True) as new:
        _in_half(pipeline).save_pretrained(new)
        _without_paths(new)
        shutil.rmtree(new / "tokenizer")
        shutil.copytree(folder / "t5_tokenizer", new / "tokenizer")
    return folder / "transformer-pipeline"


def _export(folder: Path) -> Path:
    """The same of the UNet."""
    pipeline = assemble_run(folder)
    with written_folder(folder / "pipeline", keep=True) as new:
        _in_half(pipeline).save_pretrained(new)
        _without_paths(new)
        # What the installed release writes for these two is not what others read.
        save_text_encoder(pipeline.text_encoder, new / "text_encoder")
        shutil.rmtree(new / "tokenizer")
        shutil.copytree(folder / "tokenizer", new / "tokenizer")
    return folder / "pipeline"


def _in_half(pipeline: Any) -> Any:
    """The pipeline with its weights in 16 bits."""
    for network in pipeline.components.values():
        if isinstance(network, torch.nn.Module):
            torch.nn.Module.half(network)  # that of diffusers warns of what these networks do not have
    return pipeline


def _without_paths(folder: Path) -> None:
    """Takes out of configurations where the networks were loaded from."""
    for settings in folder.glob("*/config.json"):
        write_json(settings, {name: one for name, one in read_object(settings).items() if name != "_name_or_path"})
