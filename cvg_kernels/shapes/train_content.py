"""The content encoder of the editor: a small CLIP, trained on single frames of the shapes world and their captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import log_softmax, normalize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from cvg_kernels.editing.content import embed_images, embed_texts
from cvg_kernels.shapes.files import save_model
from cvg_kernels.shapes.latents import tokenize
from cvg_kernels.shapes.model import MAX_TOKENS, TEXT_WIDTH
from cvg_kernels.shapes.world import SIZE, Scene, caption, random_scene, render
from cvg_kernels.training.fit import fit

#: Four tokens of the denoiser's cross-attention.
CONTENT_WIDTH = 4 * TEXT_WIDTH
_BATCH = 96
_RATE = 1.5e-3
_SPEED = (0.0, 6.0)


def build_content_encoder(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of 0.4 M parameters: patches of 8×8 pixels, embeddings of 256 numbers."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": CONTENT_WIDTH,
        **ids,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": CONTENT_WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CONTENT_WIDTH))


def content_frames(rng: np.random.Generator, count: int) -> tuple[list[Scene], torch.Tensor, list[str]]:
    """Single frames `[count, 3, H, W]` in [0, 1] of fresh scenes, and a caption of each.

    A caption names the things in any order, and their motion, which a frame does not show, in half of the cases.
    """
    scenes = [random_scene(rng, frames=1, speed=_SPEED, apart=bool(rng.random() < 0.5)) for _ in range(count)]
    captions = []
    for scene in scenes:
        things = [scene.things[index] for index in rng.permutation(len(scene.things))]
        if rng.random() < 0.5:
            things = [still(thing) for thing in things]
        captions.append(caption(things))
    return scenes, render(scenes)[:, 0], captions


def still(thing):
    """A thing without its motion."""
    from dataclasses import replace

    return replace(thing, direction=None)


def _contrast(model: CLIPModel, tokenizer: CLIPTokenizer, rng: np.random.Generator) -> torch.Tensor:
    """CLIP's loss, where all pairs of the batch that show the same things are right ones."""
    scenes, frames, captions = content_frames(rng, _BATCH)
    keys = [frozenset((thing.colour, thing.shape) for thing in scene.things) for scene in scenes]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    number = torch.tensor([numbers[key] for key in keys])
    right = normalize((number[:, None] == number).float(), p=1, dim=1)
    device = model.device
    images = embed_images(model, frames.to(device))
    texts = embed_texts(model, tokenize(tokenizer, captions).to(device))
    scores = model.logit_scale.exp() * images @ texts.T
    right = right.to(device)
    both = [(right * log_softmax(each, 1)).sum(1).mean() for each in (scores, scores.T)]
    return -(both[0] + both[1]) / 2


def train_content_encoder(
    folder: Path, tokenizer: CLIPTokenizer, *, seed: int, steps: int, device: torch.device
) -> CLIPModel:
    """Trains the contrastive encoder and saves it to `folder/content_encoder`.

    Loss: the cross-entropy of exp(τ) · cos(image, text) over the batch, from images to texts and from texts to images,
    spread evenly over all pairs that show the same things.
    """
    torch.manual_seed(seed)
    model = build_content_encoder(tokenizer).to(device)
    fit(
        folder,
        "content",
        model,
        lambda model, rng: _contrast(model, tokenizer, rng),
        steps=steps,
        seed=seed,
        rate=_RATE,
    )
    save_model(model.eval().to("cpu"), folder / "content_encoder")
    return model
