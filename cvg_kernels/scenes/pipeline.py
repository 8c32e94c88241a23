"""The scenes pipeline: put together from trained parts, and how clips are made with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AnimateDiffPipeline, AutoencoderKL, UNetMotionModel
from transformers import CLIPTextModel

from cvg_kernels.shapes.files import load_model, load_tokenizer
from cvg_kernels.shapes.model import assemble


def assemble_run(folder: Path) -> AnimateDiffPipeline:
    """Puts the trained parts of a run together as a stock `AnimateDiffPipeline`.

    Args:
        folder: with `tokenizer/`, `vae/` and `video/`.
    """
    pipe: Any = assemble(
        load_model(AutoencoderKL, folder / "vae"),
        load_model(CLIPTextModel, folder / "video" / "text_encoder"),
        load_tokenizer(folder / "tokenizer"),
        load_model(UNetMotionModel, folder / "video" / "unet"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
