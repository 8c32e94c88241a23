"""Gen-1's structure control: depth of a chosen level, given to a ControlNet, beside the temporal guidance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import structure_frames, temporal_layers_off  # noqa: E402
from tests.guidance.gen1_runs import SCALE, Calls, build  # noqa: E402
from tests.offline_pipelines import run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_structure_control():
    """A depth ControlNet on AnimateDiff takes the frames, and its residuals reach the image model too."""
    plain, options = build("animatediff")
    image_unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    controlnet = diffusers.ControlNetModel.from_unet(
        image_unet, conditioning_channels=3, controlnet_conditioning_channel_order="rgb"
    ).eval()
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.2)  # zero before any training
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.2)
    parts = {
        name: part
        for name, part in plain.components.items()
        if name in ("vae", "text_encoder", "tokenizer", "motion_adapter", "scheduler", "unet")
    }
    pipe = diffusers.AnimateDiffControlNetPipeline(**parts, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    depth = torch.rand(options["num_frames"], options["height"], options["width"])
    frames = structure_frames(depth, 2)
    with Calls(pipe) as seen, cvg.Gen1(2.0).attach(pipe):
        video = run(pipe, options, conditioning_frames=frames)
    with cvg.Gen1(2.0).attach(pipe):
        other = run(pipe, options, conditioning_frames=structure_frames(depth.flip(1), 2))
    assert not torch.equal(video, other)

    (latents, timestep), kwargs = seen.calls[0]
    controls = ("down_block_additional_residuals", "mid_block_additional_residual")
    latents, text = latents.chunk(2), kwargs["encoder_hidden_states"].chunk(2)
    halves = [[r.chunk(2)[half] for r in kwargs[controls[0]]] for half in range(2)]

    @torch.no_grad()
    def predict(half):
        mid = kwargs[controls[1]].chunk(2)[half]
        extra = dict(zip(controls, (halves[half], mid), strict=True))
        return pipe.unet(latents[half], timestep, encoder_hidden_states=text[half], **extra)[0]

    uncond, cond = predict(0), predict(1)
    with temporal_layers_off(pipe.unet):
        image = predict(0)
    wanted = image + 2.0 * (uncond - image) + SCALE * (cond - uncond)
    torch.testing.assert_close(seen.used[0], wanted, rtol=1e-4, atol=1e-4)


def test_structure_frames():
    depth = torch.rand(3, 20, 30) * 7 - 2
    for rounds in (0, 2):
        frames = structure_frames(depth, rounds)
        assert [frame.size for frame in frames] == [(30, 20)] * 3
        grey = torch.stack([to_tensor(frame) for frame in frames])
        structure = cvg.depth_structure(depth[None], rounds)[0]
        wanted = (structure - depth.min()) / (depth.max() - depth.min())
        torch.testing.assert_close(grey[:, 0], wanted, rtol=0, atol=0.003)
        assert torch.equal(grey[:, 0], grey[:, 2])
    with pytest.raises(cvg.ArgumentError, match=r"depth must be \[F, h, w\], got \(1, 3, 20, 30\)"):
        structure_frames(depth[None], 1)


def to_tensor(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0) / 255
