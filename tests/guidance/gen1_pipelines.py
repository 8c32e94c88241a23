"""Tiny pipelines that take Gen-1's structure or content, and clips for them."""

from __future__ import annotations

import torch

from tests.pipelines import PIPELINES
from tests.pipelines.parts import clip_processor, clip_vision
from tests.pipelines.unets import ip_adapter_weights

CONTROLLED = ["animatediff_controlnet", "animatediff_v2v_controlnet", "animatediff_sparsectrl", "wan_vace"]
OURS = ("video", "mask", "conditioning_frames", "controlnet_frame_indices", "num_frames")


def build(name: str):
    """A tiny pipeline whose control does something, and the arguments that are not for Gen-1 to make."""
    pipe, options = PIPELINES[name].build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name == "wan_vace":
            for block in pipe.transformer.vace_blocks:
                torch.nn.init.normal_(block.proj_out.weight, std=0.2)
        elif name != "animatediff":
            _awaken(pipe.controlnet)
    options = {key: value for key, value in options.items() if key not in OURS}
    strength = {"wan_vace": "conditioning_scale", "animatediff": None}
    strength = strength.get(name, "controlnet_conditioning_scale")
    return pipe, options if strength is None else {**options, strength: 3.0}


def _awaken(controlnet) -> None:
    """Weights that carry a change of the control to the other end; those at the ends are zero before any training."""
    for module in controlnet.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)


def clip_for(name: str, options) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip and its depth, of the size that the pipeline is called with."""
    frames = 9 if name == "wan_vace" else 4
    size = (options.pop("height"), options.pop("width"))
    blocks = torch.rand(frames, size[0] // 4, size[1] // 4) * 7 - 3
    depth = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return torch.rand(frames, 3, *size), depth


def with_adapter(name: str):
    """A tiny pipeline of AnimateDiff with an IP-Adapter."""
    pipe, options = build(name)
    parts = {**pipe.components, "image_encoder": clip_vision(8)}
    parts["feature_extractor"] = clip_processor()
    pipe = type(pipe)(**parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    return pipe, options
