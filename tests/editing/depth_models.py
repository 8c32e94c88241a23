"""Tiny depth models of transformers."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")

DINO = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_features": ["stage1", "stage2"],
    "reshape_hidden_states": False,
}
NECK = {"reassemble_factors": [1, 1], "neck_hidden_sizes": [8, 8], "fusion_hidden_size": 8, "head_in_index": -1}


def depth_anything(kind: str = "relative"):
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(**DINO),
        reassemble_hidden_size=16,
        head_hidden_size=8,
        depth_estimation_type=kind,
        max_depth=1 if kind == "relative" else 20,
        **NECK,
    )
    return transformers.DepthAnythingForDepthEstimation(config).eval()


def ramp(model, sign: float):
    """Makes the depth that a model gives the brightness of its frames, or what is left to 3."""

    def forward(pixel_values, **_):
        grey = pixel_values.mean(1)
        given = grey if sign > 0 else 3 - grey
        return transformers.modeling_outputs.DepthEstimatorOutput(predicted_depth=given)

    model.forward = forward
    return model
