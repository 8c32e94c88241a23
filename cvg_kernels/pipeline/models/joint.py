"""Transformers in which one attention relates text and video, in one sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cvg_kernels.pipeline.models.grids import frame_patch_grid
from cvg_kernels.pipeline.models.model import Arguments, Layers, Model, TextOrder

#: CogVideoX and ConsisID: text first, its padding attended to.
COGVIDEOX = Model(frame_patch_grid, (Layers(r"transformer_blocks\.\d+\.attn1$", "cross", "first"),), axes="BFCHW")

#: EasyAnimate: text first, the templates of two text encoders in it.
EASYANIMATE = Model(frame_patch_grid, (Layers(r"transformer_blocks\.\d+\.attn1$", "cross", "first"),))

#: Double and single blocks, the video first, the padding of the text masked; the attention of the text refiner, which
#: has no video, takes no part.
_VIDEO_THEN_TEXT = Model(
    frame_patch_grid,
    (Layers(r"transformer_blocks\.\d+\.attn$", "cross", "last"),),
    batched_branches=False,
    masks_alike=True,
)


def _first_frame(arguments: Arguments, config: Any) -> torch.Tensor | None:
    """Where an image takes the place of the first frame."""
    if config.get("image_condition_type") != "token_replace":
        return None
    latents = arguments["hidden_states"]
    given = torch.zeros(1, 1, latents.shape[2], 1, 1, device=latents.device)
    given[:, :, 0] = 1
    return given


#: HunyuanVideo: video, then text; padding is masked. Of image to video, the image's tokens are part of the text.
HUNYUAN = replace(_VIDEO_THEN_TEXT, given=_first_frame)


def _behind_image(arguments: Arguments) -> TextOrder:
    """FramePack: [earlier frames, video, image, text]; a sample alone goes without the padding of its text."""
    mask, image = arguments["encoder_attention_mask"], arguments["image_embeds"].shape[1]
    place = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape) + image
    if mask.shape[0] > 1:
        return TextOrder(place, image + mask.shape[1])
    kept = int(mask.sum())
    return TextOrder(place.masked_fill(place >= image + kept, -1), image + kept)


FRAMEPACK = replace(
    _VIDEO_THEN_TEXT,
    text_order=_behind_image,
    shared=frozenset(("attention_kwargs", "indices_latents", "indices_latents_clean"))
    | {"indices_latents_history_2x", "indices_latents_history_4x"},
)


def _valid_first(arguments: Arguments) -> TextOrder:
    """HunyuanVideo 1.5: the valid tokens of image, glyphs (ByT5) and text, then the others of each."""
    text = arguments["encoder_attention_mask"].bool()
    glyphs = arguments["encoder_attention_mask_2"].bool()
    image = arguments["image_embeds"]
    images = image.shape[1] * (image != 0).any()  # zeros: text to video
    valid, places = text.cumsum(1) - 1, (~text).cumsum(1) - 1
    before = images + glyphs.sum(1, keepdim=True)
    # All valid tokens, and those of image and glyphs that are not, stand before the text's that are not.
    behind = image.shape[1] + glyphs.shape[1] + text.sum(1, keepdim=True)
    length = image.shape[1] + glyphs.shape[1] + text.shape[1]
    return TextOrder(torch.where(text, valid + before, places + behind), length)


HUNYUAN_15 = replace(_VIDEO_THEN_TEXT, text_order=_valid_first)


def _without_padding(arguments: Arguments) -> TextOrder:
    """Mochi: the valid tokens of each sample behind its video."""
    mask = arguments["encoder_attention_mask"].bool()
    return TextOrder((mask.cumsum(1) - 1).masked_fill(~mask, -1), None)


MOCHI = Model(
    frame_patch_grid,
    (Layers(r"transformer_blocks\.\d+\.attn1$", "cross", "last"),),
    text_order=_without_padding,
    call_per_sample=True,
)


def _behind_image_if_any(arguments: Arguments) -> TextOrder | None:
    """Motif: [video, image, text]."""
    image, text = arguments.get("image_embeds"), arguments["encoder_hidden_states"]
    if image is None:
        return None
    place = torch.arange(text.shape[1], device=text.device) + image.shape[1]
    return TextOrder(place.expand(text.shape[:2]), image.shape[1] + text.shape[1])


def _decodes(denoiser: nn.Module, name: str) -> bool:
    """Motif's last single blocks attend to the video as its encoder left it, and to no text."""
    if not name.startswith("single_transformer_blocks."):
        return False
    blocks = len(denoiser.single_transformer_blocks) - denoiser.num_decoder_layers
    return int(name.split(".")[1]) >= blocks


MOTIF = replace(
    _VIDEO_THEN_TEXT,
    layers=(*_VIDEO_THEN_TEXT.layers, Layers(r"transformer_blocks\.\d+\.cross_attn$", "cross")),
    text_order=_behind_image_if_any,
    leaves_out=_decodes,
)
