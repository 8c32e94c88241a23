"""The editor of the shapes world that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.shapes.pipeline import WEIGHTS as SHAPES
from cvg_kernels.shapes.pipeline import load_pipeline

WEIGHTS = SHAPES / "editor"
#: Components that the editor has in common with the shapes pipeline, whose folder its own lies in; they are kept once.
SHARED = ("vae", "text_encoder", "tokenizer")


def load_editor(
    folder: str | Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Loads the editor of the shapes world as a `StructureContentPipeline`.

    Args:
        folder: what `cvg-kernels shapes train` has put into `RUN/pipeline/editor`, or a saved
            `StructureContentPipeline`; `None` loads the one that ships.
        device: where to put it.
        dtype: dtype of its weights.

    Raises:
        ArgumentError: if the folder holds no such pipeline, or weights that are not those of its networks.
    """
    from diffusers import PriorTransformer, UNetMotionModel
    from transformers import CLIPModel, DepthAnythingForDepthEstimation

    from cvg_kernels.editing import StructureContentPipeline
    from cvg_kernels.shapes.files import assemble_from, load_model

    folder = WEIGHTS if folder is None else Path(folder)
    if not (folder / "model_index.json").exists():
        raise ArgumentError(f"folder must hold a StructureContentPipeline, got {folder} without model_index.json")
    kinds = {
        "unet": UNetMotionModel,
        "content_encoder": CLIPModel,
        "prior": PriorTransformer,
        "depth_estimator": DepthAnythingForDepthEstimation,
    }
    # torch's own `to`: that of diffusers warns of what these networks do not have
    parts = {name: torch.nn.Module.to(load_model(kind, folder / name), dtype) for name, kind in kinds.items()}
    if not (folder / "vae").exists():
        world = load_pipeline(folder.parent, dtype=dtype)
        parts |= {name: getattr(world, name) for name in SHARED}
    pipe = assemble_from(StructureContentPipeline, folder, parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
