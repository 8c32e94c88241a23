"""UNets and Latte: text is attended to frame by frame, and temporal layers relate the frames."""

from __future__ import annotations

import re

from cvg_kernels.pipeline.models.grids import frame_patch_grid, unet_grid
from cvg_kernels.pipeline.models.model import Layers, Model

_TEXT, _WITHIN = (
    Layers(r"transformer_blocks\.\d+\.attn2$", "cross"),
    Layers(r"transformer_blocks\.\d+\.attn1$", "self"),
)

#: AnimateDiff: an image model with motion modules.
UNET_MOTION = Model(
    unet_grid,
    (Layers(r"motion_modules", "temporal"), _TEXT, _WITHIN),
    latents="sample",
    frames_in_batch=True,
    text_per_frame=True,
    temporal_modules=re.compile(r"motion_modules\.\d+$"),
)

#: ModelScope.
UNET_3D = Model(
    unet_grid,
    (Layers(r"temp_attentions|transformer_in", "temporal"), _TEXT, _WITHIN),
    latents="sample",
    frames_in_batch=True,
    temporal_modules=re.compile(r"(temp_convs|temp_attentions)\.\d+$|^transformer_in$"),
)

#: Latte: spatial and temporal blocks in turn.
LATTE = Model(
    frame_patch_grid,
    (Layers(r"temporal_transformer_blocks", "temporal"), _TEXT, _WITHIN),
    frames_in_batch=True,
    text_projection="caption_projection",
    frame_positions="temp_pos_embed",
)

#: I2VGenXL: as ModelScope; its keys are those of the text and then of the image.
I2VGENXL = Model(unet_grid, UNET_3D.layers, latents="sample", frames_in_batch=True, image_behind_text=True)

#: Stable Video Diffusion: no text; its cross-attention, to one token of an image, takes no part.
UNET_SPATIO_TEMPORAL = Model(
    unet_grid,
    (Layers(r"temporal_transformer_blocks\.\d+\.attn1$", "temporal"), _WITHIN),
    latents="sample",
    axes="BFCHW",
    frames_in_batch=True,
)
