"""Models small enough for tests."""

from __future__ import annotations

import torch
from transformers import CLIPConfig, CLIPModel

from cvg_kernels.composition import CompositionClassifier, Selection
from cvg_kernels.composition.fingerprint import fingerprint
from cvg_kernels.pipeline.models import denoisers_of
from tests.offline_pipelines import word_tokenizer

LABELS = ("left", "right", "up")


def tiny_classifier(pipe, timesteps, grid=(4, 3, 4), **options) -> CompositionClassifier:
    """For an offline pipeline. Random weights; the statistics are about those of attention to one of 14 tokens."""
    denoiser = denoisers_of(pipe)[0]
    selection = Selection.of(denoiser, grid)
    torch.manual_seed(1)
    made = CompositionClassifier(
        LABELS,
        selection,
        timesteps,
        fingerprint(denoiser, selection.layers),
        aggregator={"channels": 4, "width": 8, "depth": 1, "heads": 2},
        **{"backbone": {"kind": "small-video-net", "width": 4}, **options},
    )
    made.aggregator.mean.fill_(0.15)
    made.aggregator.std.fill_(0.02)
    return made.eval()


def tiny_clip():
    """A CLIP model of random weights with a tokenizer."""
    config = CLIPConfig(
        text_config={
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "image_size": 32,
            "patch_size": 8,
            "num_attention_heads": 2,
        },
        projection_dim=8,
    )
    return CLIPModel(config), word_tokenizer(14)
