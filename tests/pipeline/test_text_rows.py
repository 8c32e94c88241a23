"""Rows of a text followed from a text encoder to the denoiser: modular pipelines, LTX 2's connectors, selections."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.pipeline.listening import connected_rows  # noqa: E402
from cvg_kernels.pipeline.prompt import RunPrompt  # noqa: E402
from cvg_kernels.pipeline.text_rows import followed  # noqa: E402
from tests.pipelines import PIPELINES, PROMPT, run  # noqa: E402
from tests.pipelines.parts import TOKENS, word_tokenizer  # noqa: E402

OTHER = "a dog and a cat running"


# Pipelines without encode_prompt.


def blocks() -> SimpleNamespace:
    """Stands for a modular pipeline."""
    return SimpleNamespace(text_encoder=None, tokenizer=word_tokenizer(32, eos=False))


def test_a_modular_pipeline_with_a_template():
    """Followed by what the text encoder returned, other layers and other prompts besides."""
    pipe = blocks()
    made = [f"describe the cat user {text} assistant" for text in (PROMPT, OTHER)]
    ids = pipe.tokenizer(made, padding="max_length", return_tensors="pt").input_ids
    states = [torch.randn(*ids.shape, 24) for _ in range(3)]
    prompt = RunPrompt(pipe, {"prompt": [PROMPT, OTHER], "num_videos_per_prompt": 2}, None)
    prompt.live.note("text_encoder", ids)
    prompt.live.keep({"last_hidden_state": states[-1], "hidden_states": tuple(states)})
    text = states[1][:, 5:].bfloat16().repeat_interleave(2, 0)
    prompt.note_text(torch.cat([torch.randn_like(text), text]), 4, 8)
    for sample, own in enumerate(prompt.texts()):
        row = ids[sample // 2, 5:].tolist()
        for word in ("cat", "dog"):
            assert own.find([word])[0].ids == (row.index(pipe.tokenizer.convert_tokens_to_ids(word)),)
    assert not any(one.layers for one in prompt.live._given)


def test_a_modular_pipeline_of_diffusers():
    """HunyuanVideo 1.5's, whose template holds a word of the prompt, and whose prompt one that its tokenizer lacks."""
    from diffusers.modular_pipelines.hunyuan_video1_5 import HunyuanVideo15AutoBlocks

    pipe, options = PIPELINES["hunyuan_video15"].build()
    modular = HunyuanVideo15AutoBlocks().init_pipeline()
    names = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    modular.update_components(**{name: getattr(pipe, name) for name in names})
    settings = (
        "system_message",
        "prompt_template_encode_start_idx",
        "tokenizer_max_length",
        "tokenizer_2_max_length",
        "vision_num_semantic_tokens",
    )
    kind = type(modular)
    values = {name: getattr(pipe, name) for name in settings}
    modular.__class__ = type(kind.__name__, (kind,), values)
    with cvg.capture(modular, ["video", "cat"], steps=[0]) as captured:
        run(modular, options, prompt="a video of a cat")
    assert [[span.ids for span in each] for each in captured.tokens] == [[(1,), (4,)]]


def test_a_modular_pipeline_that_changes_the_rows():
    pipe = blocks()
    prompt = RunPrompt(pipe, {"prompt": PROMPT}, None)
    ids = pipe.tokenizer(PROMPT, return_tensors="pt").input_ids
    prompt.live.note("text_encoder", ids)
    prompt.live.keep((torch.randn(*ids.shape, 24),))
    prompt.note_text(torch.randn(1, 5, 24), 0, 1)
    with pytest.raises(cvg.ArgumentError, match="the denoiser's text is nothing its text encoder"):
        prompt.texts()


def test_rows_are_followed():
    source = torch.randn(9, 20)
    order = [3, 8, 8, 0, 5]
    assert followed(source[order], source) == tuple(order)
    assert followed(source[order].bfloat16(), source) == tuple(order)
    assert followed(torch.cat([source[2:], torch.zeros(3, 20)]), source) == (*range(2, 9), *[None] * 3)
    beside = torch.randn(9, 20)
    for text in (
        torch.cat([source, beside], 1),
        torch.cat([beside, source], 1),
        torch.stack([source, beside], -1).flatten(1),
    ):
        assert followed(text[order], source) == tuple(order)
    alike = source.clone()
    alike[3:6] = alike[3]  # rows of padding
    assert followed(alike[2:], alike) == tuple(range(2, 9))
    assert followed(torch.randn(4, 20), source) is None
    nearly = source[1:3].clone()
    nearly[0, -1] += 1  # in a channel that is not compared at first
    assert followed(nearly, source) == (None, 2)


@pytest.mark.parametrize("registers", [None, TOKENS])
def test_the_connectors_of_ltx2(registers):
    """Without their attention they work on each token alone: what comes out of a token changes with it."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=registers,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=registers,
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    ).eval()
    for name, module in connectors.named_modules():
        if name.endswith("attn1"):
            module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, :5], mask[1, :2] = 0, 0
    text = torch.randn(2, TOKENS, 48)
    with torch.no_grad():
        before = connectors(text, mask)[0]
        for sample, rows in enumerate(connected_rows(connectors, mask)):
            assert len(rows) == TOKENS
            for at in mask[sample].nonzero().flatten().tolist():
                changed = text.clone()  # channels change places: the mean and the range stay
                changed[sample, at] = changed[sample, at].roll(3)
                moved = (connectors(changed, mask)[0] - before)[sample].norm(dim=-1)
                assert rows[int(moved.argmax())] == at and rows.count(at) == 1
