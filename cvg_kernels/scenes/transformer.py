"""The second model of the world of scenes: a small video transformer of CogVideoX's kind, all stock classes.

Text and video are one sequence, every token of which attends to every other. So what is claimed for a UNet, whose
words stand in layers of their own, is tried on the other family of video models as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from cvg_kernels.reading import read_object
from cvg_kernels.scenes.captions import all_words
from cvg_kernels.scenes.model import MAX_TOKENS, TEXT_WIDTH
from cvg_kernels.scenes.world import FRAMES
from cvg_kernels.shapes.files import load_fast_tokenizer
from cvg_kernels.writing import write_json, written_folder

_HEADS = 4
_HEAD_DIM = 32
_LAYERS = 6
_TIME_WIDTH = 64


def build_t5_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Makes a tokenizer as T5 has it: each word of the captions is one piece, "▁" for the space before it.

    Any other word falls apart into letters. Nothing stands before a text, `</s>` behind it.

    Args:
        folder: where the tokenizer's files are written.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(f"▁{word}", -1.0) for word in all_words() if len(word) > 1]
    pieces += [("▁a", -1.0), ("▁", -4.0), *((letter, -8.0) for letter in letters)]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_folder(folder) as new:
        tokenizer.save_pretrained(new)
        settings = read_object(new / "tokenizer_config.json")
        settings.pop("backend", None)  # transformers 5 writes names that 4 does not know, and reads those of 4
        write_json(new / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    return load_fast_tokenizer(folder)


def build_t5_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """The text encoder: two layers that read a text in both directions, trained together with the transformer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            is_encoder_decoder=False,
            tie_word_embeddings=False,
        )
    )


@torch.no_grad()
def build_transformer() -> CogVideoXTransformer3DModel:
    """The denoiser: six layers over 8×8 patches of every frame and 32 tokens of text.

    Every layer begins as the identity (the projections of its gates are zero), from which small transformers learn
    fastest.
    """
    model = CogVideoXTransformer3DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=4,
        out_channels=4,
        time_embed_dim=_TIME_WIDTH,
        text_embed_dim=TEXT_WIDTH,
        num_layers=_LAYERS,
        sample_width=16,
        sample_height=16,
        sample_frames=FRAMES,
        patch_size=2,
        temporal_compression_ratio=1,
        max_text_seq_length=MAX_TOKENS,
        spatial_interpolation_scale=1.0,
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("norm1.linear", "norm2.linear", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model
