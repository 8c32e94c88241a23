"""The networks of the shapes world, and how they are put together, saved and loaded as a diffusers pipeline."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cvg_kernels.shapes.files import END, START, save_tokenizer
from cvg_kernels.shapes.world import COLOURS, DIRECTIONS, SHAPES, Thing, caption

#: Tokens of a prompt, BOS and EOS included: two things take thirteen.
MAX_TOKENS = 16
TEXT_WIDTH = 64
_CHANNELS = (48, 64)
_HEADS = 4
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
    corpus = [caption([Thing(*words)]) + " and " for words in itertools.product(COLOURS, SHAPES, DIRECTIONS)]
    # Each letter once inside a word and once at its end, so that no text is ever unknown.
    corpus.append(" ".join(f"{letter} {letter}a" for letter in letters))
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
    """The image autoencoder: 64×64 pixels to 4×8×8 latents, 0.3 M parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
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
            num_attention_heads=_HEADS,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_image_denoiser() -> UNet2DConditionModel:
    """The denoiser of single images: text cross-attention at 8×8 and 4×4, 1.3 M parameters."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=_HEADS,  # in this class the name means the number of heads
        norm_num_groups=_GROUPS,
    )


@torch.no_grad()
def build_motion_adapter() -> MotionAdapter:
    """The motion modules that turn the image denoiser into one of video, 0.5 M parameters.

    The first attention of each module starts as a band: its queries and keys are the features themselves, so a frame
    attends to itself and to its neighbours, as trained temporal attention does. From uniform attention, which hands
    every frame the same average, a small model finds out very slowly that frames have an order.
    """
    adapter = MotionAdapter(
        block_out_channels=_CHANNELS,
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=_HEADS,
        motion_norm_num_groups=_GROUPS,
        use_motion_mid_block=True,
    )
    for name, module in adapter.named_modules():
        if name.endswith("attn1"):
            for projection in (module.to_q, module.to_k):
                projection.weight.copy_(torch.eye(len(projection.weight)))
    return adapter


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of training and sampling: linear betas, v-prediction, trailing timesteps."""
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def fold_latent_scale(autoencoder: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> AutoencoderKL:
    """Moves the standardisation (z − mean) / std of each latent channel into the autoencoder's 1×1 convolutions.

    A stock pipeline knows one scaling factor only; folded, the latents it sees have mean 0 and variance 1 in every
    channel and decode as before.

    Args:
        autoencoder: with its 1×1 `quant_conv` and `post_quant_conv`; changed in place and returned.
        mean: `[C]`, mean of each channel.
        std: `[C]`, standard deviation of each channel.
    """
    channels = len(mean)
    encode, decode = autoencoder.quant_conv, autoencoder.post_quant_conv
    encode.weight[:channels] /= std.view(-1, 1, 1, 1)
    encode.bias[:channels] = (encode.bias[:channels] - mean) / std
    encode.bias[channels:] -= 2 * std.log()  # the second half holds log variances
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std.view(1, -1, 1, 1)
    return autoencoder


def assemble(
    autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, denoiser: UNetMotionModel
) -> AnimateDiffPipeline:
    """Puts trained parts together as a stock `AnimateDiffPipeline`."""
    return AnimateDiffPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        motion_adapter=None,
        scheduler=build_scheduler(),
    )
