"""The networks of the world of scenes: an autoencoder, a text encoder and a video UNet, all stock classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cvg_kernels.scenes.captions import all_words
from cvg_kernels.shapes.files import END, START, save_tokenizer

#: Tokens of a prompt, BOS and EOS included.
MAX_TOKENS = 32
TEXT_WIDTH = 64
_CHANNELS = (32, 64, 64)
_TEXT_HEADS = 4
_HEAD_DIM = 16
_GROUPS = 8


def build_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Learns a byte-pair vocabulary in which every word of the captions is one token.

    The words of the world are single tokens; any other word falls apart into letters, as with a large tokenizer.

    Args:
        folder: where the tokenizer's files are written.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    # Each letter once inside a word and once at its end, so that no text is ever unknown.
    corpus = 2 * [" ".join(all_words())] + [" ".join(f"{letter} {letter}a" for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=2, special_tokens=[START, END], end_of_word_suffix="</w>"
    )
    learner.train_from_iterator(corpus, trainer)
    model = json.loads(learner.to_str())["model"]
    vocabulary = model["vocab"]
    # The learner numbers the letters that end a word in no fixed order; a seed shall mean one run.
    endings = sorted(token for token in vocabulary if len(token) == len("a</w>") and "</w>" in token)
    numbers = sorted(vocabulary[token] for token in endings)
    vocabulary.update(zip(endings, numbers, strict=True))
    return save_tokenizer(Path(folder), vocabulary, model["merges"], MAX_TOKENS)


def build_autoencoder() -> AutoencoderKL:
    """The image autoencoder: 64×64 pixels to 4×16×16 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 24, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=_GROUPS,
        sample_size=64,
        scaling_factor=1.0,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder: two layers of width 64, trained together with the denoiser."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=_TEXT_HEADS,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_image_denoiser() -> UNet2DConditionModel:
    """The denoiser of single images: text cross-attention at 16×16, 8×8 and, in the middle, 4×4."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        # in this class the name means the number of heads
        attention_head_dim=tuple(channels // _HEAD_DIM for channels in _CHANNELS),
        norm_num_groups=_GROUPS,
    )


@torch.no_grad()
def build_motion_adapter() -> MotionAdapter:
    """The motion modules that turn the image denoiser into one of video.

    The first attention of each module starts as a band: its queries and keys are the features themselves, so a frame
    attends to itself and to its neighbours, as trained temporal attention does. From uniform attention, which hands
    every frame the same average, a small model finds out very slowly that frames have an order.
    """
    adapter = MotionAdapter(
        block_out_channels=_CHANNELS,
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=_GROUPS,
        use_motion_mid_block=True,
    )
    for name, module in adapter.named_modules():
        if name.endswith("attn1"):
            for projection in (module.to_q, module.to_k):
                projection.weight.copy_(torch.eye(len(projection.weight)))
    return adapter
