"""A tiny `StructureContentPipeline` with random weights."""

from __future__ import annotations

import torch

from cvg_kernels.editing import StructureContentPipeline


def tiny_editor(seed: int = 0) -> StructureContentPipeline:
    """The networks of the shapes world as they are before training, put together.

    Args:
        seed: of their weights.
    """
    from diffusers import UNetMotionModel

    from cvg_kernels.shapes.model import build_scheduler
    from cvg_kernels.shapes.pipeline import load_pipeline
    from cvg_kernels.shapes.train_content import build_content_encoder
    from cvg_kernels.shapes.train_depth import build_depth_estimator
    from cvg_kernels.shapes.train_prior import build_prior

    world = load_pipeline()
    torch.manual_seed(seed)
    unet = UNetMotionModel.from_config({**world.unet.config, "in_channels": 12})
    pipe = StructureContentPipeline(
        vae=world.vae,
        text_encoder=world.text_encoder,
        tokenizer=world.tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        content_encoder=build_content_encoder(world.tokenizer).eval(),
        prior=build_prior().eval(),
        depth_estimator=build_depth_estimator().eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
