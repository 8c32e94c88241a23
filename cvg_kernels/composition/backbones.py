"""What looks at the aggregated volume: a small 3-D network, or a frozen vision-language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate, normalize

from cvg_kernels.errors import ArgumentError


class SmallVideoNet(nn.Module):
    """The default: three 3-D convolutions and a linear head, volumes `[B, c, F, h, w]` → logits `[B, labels]`.

    Nothing is normalised on the way: how strongly a map stands out tells whether its entity will be there at all.

    Args:
        labels: Y.
        channels: c.
        width: width of the convolutions.
        dropout: before the head.
    """

    kind = "small-video-net"

    def __init__(self, labels: Sequence[str], channels: int, *, width: int = 24, dropout: float = 0.2) -> None:
        super().__init__()
        self.settings = {"width": width, "dropout": dropout}
        self.encode = nn.Sequential(
            nn.Conv3d(channels, width, 3, padding=1),
            nn.GELU(approximate="tanh"),
            nn.Conv3d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(approximate="tanh"),
            nn.Conv3d(2 * width, 2 * width, 3, padding=1),
            nn.GELU(approximate="tanh"),
            nn.AdaptiveAvgPool3d(4),
            nn.Flatten(),  # where something is tells, with the frame, where it goes: no pooling over places
            nn.Linear(2 * width * 4**3, 2 * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(2 * width, len(labels))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Logits of each volume."""
        return self.head(self.encode(volume))


class VisionLanguage(nn.Module):
    """A frozen model of images and text (CLIP, SigLIP); the head is its text embeddings of the labels.

    A trained 1×1×1 convolution paints each frame of the volume in three channels; the frames are laid out on one
    sheet, row by row, and the sheet is what the model sees: it knows no time, and so time becomes place. The logits
    are the scaled cosines of the sheet's embedding and those of the labels' sentences.

    Args:
        labels: Y.
        channels: c.
        model: `CLIPModel` or `SiglipModel` of transformers. It is frozen, stays in eval mode, and is not saved.
        tokenizer: tokenizer of the model.
        template: sentence of a label.
        scale: scale of the cosines.
    """

    kind = "vision-language"
    model: Any  # a class of transformers
    text: torch.Tensor

    def __init__(
        self,
        labels: Sequence[str],
        channels: int,
        *,
        model: nn.Module,
        tokenizer: Any,
        template: str = "something moving {}",
        scale: float = 20.0,
    ) -> None:
        super().__init__()
        self.settings = {"template": template, "scale": scale}
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.render = nn.Conv3d(channels, 3, 1)
        self.register_buffer("text", self.embed(labels))
        self.register_state_dict_post_hook(_leave_out_model)
        self.register_load_state_dict_post_hook(_expect_no_model)

    @torch.no_grad()
    def embed(self, labels: Sequence[str]) -> torch.Tensor:
        """Text embeddings of labels' sentences, `[labels, d]`, of length 1."""
        sentences = [self.settings["template"].format(label) for label in labels]
        tokens = self.tokenizer(sentences, padding=True, return_tensors="pt")
        tokens = {name: ids.to(self.model.device) for name, ids in tokens.items()}
        accepted = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
        return normalize(_pooled(self.model.get_text_features(**accepted)), dim=-1)

    def train(self, mode: bool = True) -> VisionLanguage:
        """Sets the mode of the trained part; the frozen model stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def sheet(self, volume: torch.Tensor) -> torch.Tensor:
        """Paints volumes `[B, c, F, h, w]` and lays the frames out on sheets `[B, 3, size, size]`."""
        frames = self.render(volume).transpose(1, 2)  # [B, F, 3, h, w]
        side = math.ceil(math.sqrt(frames.shape[1]))
        size = self.model.config.vision_config.image_size
        tile = size // side
        tiles = interpolate(frames.flatten(0, 1), (tile, tile), mode="bilinear", align_corners=False).unflatten(
            0, frames.shape[:2]
        )
        sheet = volume.new_zeros(len(volume), 3, size, size)
        for frame in range(frames.shape[1]):
            row, column = divmod(frame, side)
            sheet[:, :, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile] = tiles[:, frame]
        return sheet

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Logits of each volume."""
        image = _pooled(self.model.get_image_features(pixel_values=self.sheet(volume)))
        return self.settings["scale"] * normalize(image, dim=-1) @ self.text.T


def _leave_out_model(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """Keeps the frozen model out of checkpoints and saved classifiers."""
    for name in [name for name in state if name.startswith(f"{prefix}model.")]:
        del state[name]


def _expect_no_model(module: nn.Module, incompatible: Any) -> None:
    """The other side of `_leave_out_model`: the frozen model is not missed."""
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if "backbone.model." not in f".{name}"]


def _pooled(features: Any) -> torch.Tensor:
    """The embedding, which newer releases of transformers hand out inside an output object."""
    return features if torch.is_tensor(features) else features.pooler_output


def build_backbone(
    settings: dict[str, Any], labels: Sequence[str], channels: int, vision_language: Any = None
) -> nn.Module:
    """Makes a backbone from its settings.

    Args:
        settings: `kind` and the arguments of the class.
        labels: Y.
        channels: c.
        vision_language: the pair (model, tokenizer), where the kind needs one.

    Raises:
        ArgumentError: for an unknown kind, or a model that is missing.
    """
    options = {name: value for name, value in settings.items() if name != "kind"}
    if settings["kind"] == SmallVideoNet.kind:
        return SmallVideoNet(labels, channels, **options)
    if settings["kind"] == VisionLanguage.kind:
        if vision_language is None:
            raise ArgumentError(
                "vision_language must be given, as the pair (model, tokenizer): the frozen model is not stored with "
                "the classifier"
            )
        model, tokenizer = vision_language
        return VisionLanguage(labels, channels, model=model, tokenizer=tokenizer, **options)
    raise ArgumentError(
        f"backbone must be '{SmallVideoNet.kind}' or '{VisionLanguage.kind}', got {settings['kind']!r}"
    )
