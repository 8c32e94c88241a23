"""What tiny pipelines are put together from: tokenizers, text and image encoders, autoencoders, images; random
weights.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderKLWan
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

#: Of most text encoders; no grid has as many places, so that maps can be told by their shape.
TOKENS = 14

_WORDS = ["a", "red", "cat", "and", "blue", "dog", "running"]
_TEMPLATE_WORDS = ["the", "system", "user", "assistant", "describe", "video"]
_MARKS = ["<image>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
_VOCABULARY = ["<pad>", "<bos>", "</s>", "<unk>", *_WORDS, *_TEMPLATE_WORDS, *_MARKS]
IMAGE_TOKEN = _VOCABULARY.index("<image>")
#: Beginning, end and padding, and room for the vocabulary, as configurations of text encoders name them.
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 32}

_CHAT = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} "
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def word_tokenizer(
    length: int, *, bos: bool = True, eos: bool = True, chat: bool = False, side: str = "right"
) -> PreTrainedTokenizerFast:
    """A token a word; `chat` gives it a template, `side` is where the padding goes."""
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(_VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> " * bos + "$A" + " </s>" * eos, special_tokens=[("<bos>", 1), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side=side,
        additional_special_tokens=_MARKS,
    )
    if chat:
        fast.chat_template = _CHAT
    return fast


def t5_tokenizer(length: int = TOKENS) -> PreTrainedTokenizerFast:
    """Nothing before the prompt, an end behind it."""
    return word_tokenizer(length, bos=False)


def clip(width: int) -> CLIPTextModel:
    return CLIPTextModel(clip_config(width)).eval()


def clip_config(width: int, **changes: Any) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        **IDS, hidden_size=width, intermediate_size=16, num_attention_heads=4, num_hidden_layers=2, **changes
    )


def t5(width: int, vocabulary: int = 32) -> T5EncoderModel:
    config = transformers.T5Config(vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def qwen(width: int) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL, its vision tower too."""
    text = dict(
        **IDS,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        rope_theta=1e6,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling=rope(2, 2, 4),
    )
    vision = {"depth": 1, "hidden_size": width, "intermediate_size": width, "num_heads": 2, "out_hidden_size": width}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_end_token_id=31,
        vision_start_token_id=30,
        vision_token_id=29,
        image_token_id=28,
        video_token_id=27,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def rope(*sections: int) -> dict[str, Any]:
    """Rotary positions of time, rows and columns, as Qwen's configurations name them."""
    return {"mrope_section": list(sections), "rope_type": "default", "type": "default"}


def clip_vision(width: int, size: int = 32) -> transformers.CLIPVisionModelWithProjection:
    """17 tokens for an image, whatever its size."""
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        intermediate_size=16,
        patch_size=size // 4,
    )
    return transformers.CLIPVisionModelWithProjection(config).eval()


def clip_processor(size: int = 32) -> Any:
    # The name that works without torchvision; older versions of transformers have one name only.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(crop_size={"height": size, "width": size}, size={"shortest_edge": size})


def autoencoder(halvings: int) -> AutoencoderKL:
    blocks = halvings + 1
    return AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        latent_channels=4,
        norm_num_groups=2,
    )


def wan_autoencoder() -> AutoencoderKLWan:
    """Eighths of rows and columns, quarters of frames."""
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 255, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(made.numpy())


def clip_of(width: int, height: int, frames: int, mode: str = "RGB") -> list[Image.Image]:
    """Frames that have nothing to do with each other; `mode="L"` for masks."""
    return [image(width, height, seed).convert(mode) for seed in range(frames)]
