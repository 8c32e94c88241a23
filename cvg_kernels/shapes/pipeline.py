"""The shapes pipeline that ships, and how it is run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.shapes.world import FRAMES, SIZE

WEIGHTS = Path(__file__).with_name("weights")
#: How clips of the shapes world are sampled, unless said otherwise.
STEPS = 20
GUIDANCE_SCALE = 3.0


def load_pipeline(
    folder: str | Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Loads the shapes pipeline as a stock `AnimateDiffPipeline`.

    Args:
        folder: a pipeline folder made by `cvg-kernels shapes train`; `None` loads the one that ships.
        device: where to put it.
        dtype: dtype of its weights.

    Raises:
        ArgumentError: if the folder holds no pipeline, or weights that are not those of its networks.
    """
    from diffusers import AnimateDiffPipeline, AutoencoderKL, UNetMotionModel
    from transformers import CLIPTextModel

    from cvg_kernels.shapes.files import load_networks

    folder = WEIGHTS if folder is None else Path(folder)
    if not (folder / "model_index.json").exists():
        raise ArgumentError(f"folder must hold a diffusers pipeline, got {folder} without model_index.json")
    kinds = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "unet": UNetMotionModel}
    return load_networks(AnimateDiffPipeline, folder, kinds, dtype).to(device)


def sample(
    pipe: VideoPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    guidance: Any = None,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    frames: int = FRAMES,
    **options: Any,
) -> torch.Tensor:
    """Makes clips `[B, F, 3, 64, 64]` in [0, 1]; a clip depends on its prompt and seed alone.

    Args:
        pipe: the shapes pipeline.
        prompts: one a clip.
        seeds: one a clip.
        guidance: a guidance method, or `None`.
        steps: denoising steps.
        guidance_scale: scale of classifier-free guidance.
        frames: length of the clips.
        **options: what the pipeline's call takes besides.
    """
    with nullcontext() if guidance is None else guidance.attach(pipe):
        result = pipe(
            prompts,
            num_frames=frames,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            **options,
        )
    return result.frames.float().cpu()
