"""Capture and the drop-in processors on tiny pipelines: same video, right maps, nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import AnimateDiffPipeline  # noqa: E402
from diffusers.models.attention_processor import AttnProcessor  # noqa: E402
from torch.nn import functional  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance.flow_graph import Group, flow_groups  # noqa: E402
from cvg_kernels.pipeline.layers import attention_layers  # noqa: E402
from cvg_kernels.pipeline.models import denoisers_of  # noqa: E402
from tests.offline_pipelines import (  # noqa: E402
    BUILDERS,
    LATENTS,
    LATTE_TOKENS,
    PROMPT,
    TOKENS,
    animatediff,
    cogvideox,
    latte,
    noise,
    run,
)
from tests.pipelines import PIPELINES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = list(BUILDERS)


def processors_of(pipe):
    return {
        layer.name: layer.module.processor for denoiser in denoisers_of(pipe) for layer in attention_layers(denoiser)
    }


def eager_maps(pipe, options, monkeypatch, **changes):
    """Every softmax matrix of the pipeline's attention, in the order of the calls, in float64."""
    found = []
    stock = functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest):
        logits = query.double() @ key.double().mT * (scale or query.shape[-1] ** -0.5)
        logits = logits if attn_mask is None else logits + attn_mask
        found.append(logits.softmax(-1).mean(1).float())
        return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", spy)
        run(pipe, options, **changes)
    return found


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_the_drop_in_processors_change_nothing(name):
    pipe, options = BUILDERS[name]()
    stock, before = run(pipe, options), processors_of(pipe)
    with cvg.processors(pipe), cvg.trace_backends() as ran:
        swapped = run(pipe, options)
    assert ran and {operation for operation, _ in ran} <= {"attention", "temporal_attention"}
    torch.testing.assert_close(swapped, stock, rtol=1e-4, atol=1e-4)
    assert all(processors_of(pipe)[layer] is before[layer] for layer in before)
    handle = cvg.use_processors(pipe)
    assert any(processors_of(pipe)[layer] is not before[layer] for layer in before)
    handle.restore()
    assert all(processors_of(pipe)[layer] is before[layer] for layer in before)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_maps_are_the_eager_ones(name, monkeypatch):
    """Cross maps of every layer, step and branch against softmax(q kᵀ) of the stock run."""
    pipe, options = BUILDERS[name]()
    stock = run(pipe, options)
    with cvg.capture(pipe, words=["cat", "blue dog"]) as captured:
        video = run(pipe, options)
    torch.testing.assert_close(video, stock, rtol=1e-4, atol=1e-4)

    tokens = pipe.tokenizer(PROMPT).input_ids
    every = eager_maps(pipe, options, monkeypatch)
    # The text encoder attends from tokens to tokens; the denoiser from places to tokens.
    length = LATTE_TOKENS if name == "latte" else TOKENS
    frames, rows, columns = captured.records[0].grid
    if name == "cogvideox":  # its denoiser from text and places to text and places
        everything = length + frames * rows * columns
        every = [p[:, length:, :length] for p in every if p.shape[-1] == everything]
    eager = [p for p in every if p.shape[-1] == length and p.shape[-2] != length]
    wanted = []
    for p in eager:  # [B', N, tokens]
        chosen = torch.stack([p[..., 3], p[..., 6] + p[..., 7]], 1)  # [B', K, N]
        if name in ("wan", "cogvideox"):
            wanted += list(chosen.unflatten(-1, (frames, -1))[:, None])
        else:
            wanted += list(chosen.unflatten(0, (2, 1, frames)).transpose(2, 3))
    assert tokens[3] == pipe.tokenizer.convert_tokens_to_ids("cat")
    assert len(wanted) == len(captured.records)
    for record, want in zip(captured.records, wanted, strict=True):
        assert record.words == ("cat", "blue dog")
        assert record.maps.shape == (1, 2, *record.grid)
        assert record.maps.dtype == torch.float32 and not record.maps.requires_grad
        torch.testing.assert_close(record.maps.flatten(3), want, rtol=1e-4, atol=1e-5)
    assert {record.branch for record in captured.records} == {"cond", "uncond"}
    assert sorted({record.step for record in captured.records}) == [0, 1, 2]


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", ["animatediff", "modelscope", "latte"])
def test_temporal_maps_are_the_eager_ones(name, monkeypatch):
    pipe, options = BUILDERS[name]()
    with cvg.capture(pipe, temporal=True, keep="device") as captured:
        run(pipe, options)
    assert {record.kind for record in captured.records} == {"temporal"}
    frames = LATENTS[name][0]
    eager = [p for p in eager_maps(pipe, options, monkeypatch) if p.shape[-2:] == (frames, frames)]
    wanted = [half for p in eager for half in p.chunk(2)]
    assert len(wanted) == len(captured.records)
    for record, want in zip(captured.records, wanted, strict=True):
        assert record.maps.shape == (1, record.grid[1] * record.grid[2], frames, frames)
        torch.testing.assert_close(record.maps[0], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(record.maps.sum(-1), torch.ones(record.maps.shape[:-1]))


def test_latte_reads_the_prompt_in_small_letters_and_without_padding():
    """As its pipeline is called by default: the text of a single prompt ends with its last token."""
    pipe, options = latte()
    options["mask_feature"] = True
    with cvg.capture(pipe, words=["Cat", "dog"], temporal=True) as captured:
        run(pipe, options, "A red CAT and a blue dog")
    with cvg.capture(pipe, words="all") as every:
        run(pipe, options)
    assert [[span.ids for span in spans] for spans in captured.tokens] == [[(3,), (7,)]]
    torch.testing.assert_close(captured.heat_map("Cat"), every.heat_map("cat"))
    assert {record.grid for record in captured.records} == {(4, 4, 8)}
    begin_and_end = 1 - every.records[0].maps.sum(1)  # what is left for the two tokens of no word
    assert begin_and_end.mean() < 0.3  # 0.6 with the padding


def test_the_flow_graph_of_each_network():
    """Each text layer with the temporal layers behind it, and the attention within frames beside it."""
    pipe, _ = latte()
    assert flow_groups(pipe.transformer, "soft", True) == [
        Group(
            f"transformer_blocks.{i}.attn2",
            (f"temporal_transformer_blocks.{i}.attn1",),
            f"transformer_blocks.{i}.attn1",
        )
        for i in range(2)
    ]
    for name in ("animatediff", "modelscope"):
        groups = flow_groups(denoisers_of(BUILDERS[name]()[0])[0], "soft", True)
        assert all(len(group.temporal) == 2 for group in groups)
    for name, block, cross, self in (
        ("wan", "blocks", "attn2", "attn1"),
        ("cogvideox", "transformer_blocks", "attn1", "attn1"),
    ):  # what a layer writes goes through the attention over the video in the next block
        assert flow_groups(denoisers_of(BUILDERS[name]()[0])[0], "soft", False) == [
            Group(f"{block}.0.{cross}", (f"{block}.1.{self}:frames",)),
            Group(f"{block}.1.{cross}"),
        ]
    pipe, _ = PIPELINES["hunyuan_video"].build()
    groups = {group.cross: group.temporal for group in flow_groups(pipe.transformer, "soft", False)}
    last = len(pipe.transformer.transformer_blocks) - 1
    assert groups[f"transformer_blocks.{last}.attn"] == ("single_transformer_blocks.0.attn:frames",)


@pytest.mark.parametrize(("patch_size_t", "grid"), [(None, (3, 2, 3)), (2, (2, 2, 3))])
def test_cogvideox_looks_from_the_video_to_the_text(patch_size_t, grid):
    """A word's heat map has the grid of the video alone,
    and the tokens of the text share what the video leaves them.
    """
    pipe, options = cogvideox(patch_size_t)
    stock = run(pipe, options)
    with cvg.capture(pipe, words="all") as captured:
        video = run(pipe, options)
    torch.testing.assert_close(video, stock, rtol=1e-4, atol=1e-4)
    assert {record.grid for record in captured.records} == {grid}
    assert captured.heat_map("cat").shape == grid
    assert captured.heat_map("cat", size=(8, 12)).shape == (grid[0], 8, 12)
    share = torch.stack([record.maps.sum(1) for record in captured.records])
    assert (share > 0).all() and (share < 1).all()


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_a_word_beyond_the_text_is_refused(name):
    """Where the pipeline reads less than its tokenizer; in joint attention a token of the video stands there."""
    pipe, options = BUILDERS[name]()
    options["max_sequence_length"] = 6
    encoded = pipe.encode_prompt(PROMPT, max_sequence_length=6)
    given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), encoded, strict=True))
    message = "'dog' lies beyond the 6 tokens that the text encoder reads: .* raise max_sequence_length"
    for words in (["dog"], ["cat", "dog"]):
        for attach in (cvg.capture, lambda pipe, words, prompt: cvg.Vico(words).attach(pipe, prompt)):
            with pytest.raises(cvg.ArgumentError, match=message), attach(pipe, words, prompt=None):
                run(pipe, options)
            with pytest.raises(cvg.ArgumentError, match=message), attach(pipe, words, prompt=PROMPT):
                run(pipe, options, None, **given)
    with cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, options)
    assert captured.heat_map("cat").ndim == 3


def test_levels_that_are_rounded_up_have_their_grid():
    pipe, options = animatediff()
    with cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, options)
    assert {record.grid for record in captured.records} == {(4, 5, 7), (4, 3, 4)}
    assert captured.heat_map("cat").shape == (4, 5, 7)
    assert captured.heat_map("cat", size=(20, 28)).shape == (4, 20, 28)


@pytest.mark.parametrize("name", NAMES)
def test_without_classifier_free_guidance(name):
    pipe, options = BUILDERS[name]()
    with cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, options, guidance_scale=1.0)
    assert {record.branch for record in captured.records} == {"cond"}


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", NAMES)
def test_several_prompts_at_once(name):
    """Each sample of a batch has the maps that it has alone, also where its word stands elsewhere."""
    pipe, options = BUILDERS[name]()
    prompts = [PROMPT, "a dog and a red cat"]

    def call(prompt, latents):
        with cvg.capture(pipe, words=["cat"], steps=[0]) as captured:
            run(pipe, options, prompt, latents=latents, num_inference_steps=2)
        return captured.records

    start = noise(name, pipe, 2)
    together = call(prompts, start)
    for sample, prompt in enumerate(prompts):
        alone = call(prompt, start[sample : sample + 1])
        for both, one in zip(together, alone, strict=True):
            assert (both.layer, both.branch) == (one.layer, one.branch)
            torch.testing.assert_close(both.maps[sample], one.maps[0], rtol=1e-3, atol=1e-5)


def test_options_of_capture():
    pipe, options = animatediff()
    with cvg.capture(
        pipe, words=["cat", ("a", 1)], layers=r"down_blocks\.0", head_reduction="none", steps=[1]
    ) as per_head:
        run(pipe, options)
    assert {record.step for record in per_head.records} == {1}
    assert all("down_blocks.0" in record.layer for record in per_head.records)
    assert per_head.records[0].words == ("cat", "a#1")
    assert per_head.records[0].maps.ndim == 6
    with cvg.capture(pipe, words="all", layers=lambda layer: "down_blocks.0" in layer, steps=[1]) as every:
        run(pipe, options)
    assert every.records[0].words == ("a", "red", "cat", "and", "a#1", "blue", "dog")
    torch.testing.assert_close(
        per_head.records[0].maps.mean(1)[:, 0], every.records[0].maps[:, 2], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(per_head.heat_map("cat"), every.heat_map("cat"), rtol=1e-4, atol=1e-6)
    with pytest.raises(cvg.ArgumentError, match="word 'dog' was not captured .* captured: cat, a#1"):
        per_head.heat_map("dog")


def test_embeddings_instead_of_a_prompt():
    pipe, options = animatediff()
    embeddings, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    given = {"prompt_embeds": embeddings, "negative_prompt_embeds": negative}
    with pytest.raises(cvg.ArgumentError, match="pass prompt="), cvg.capture(pipe, words=["cat"]):
        run(pipe, options, None, **given)
    with cvg.capture(pipe, words=["cat"], prompt=PROMPT) as named:
        run(pipe, options, None, **given)
    with cvg.capture(pipe, words=["cat"]) as usual:
        run(pipe, options)
    torch.testing.assert_close(named.heat_map("cat"), usual.heat_map("cat"))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_after_an_exception(name):
    pipe, options = BUILDERS[name]()
    run(pipe, options)  # notes things on the pipeline
    before, kind, attributes = processors_of(pipe), type(pipe), set(vars(pipe))
    with pytest.raises(cvg.ArgumentError, match="'bird' is not in the prompt"), cvg.capture(pipe, words=["bird"]):
        run(pipe, options)
    with pytest.raises(ZeroDivisionError), cvg.capture(pipe, words=["cat"]):
        raise ZeroDivisionError
    assert all(processors_of(pipe)[layer] is before[layer] for layer in before)
    assert (type(pipe), vars(pipe).keys()) == (kind, attributes)
    for denoiser in denoisers_of(pipe):
        assert not denoiser._forward_pre_hooks and not denoiser._forward_hooks


def test_captures_one_in_the_other_both_record():
    pipe, options = animatediff()
    with cvg.capture(pipe, words=["cat"]) as alone:
        run(pipe, options)
    with cvg.capture(pipe, words=["cat"]) as outer:
        with cvg.capture(pipe, words=["dog"]) as inner:
            run(pipe, options)
        assert len(inner.records) == len(outer.records) == len(alone.records)
        run(pipe, options)
    assert len(inner.records) == len(alone.records) and inner.words == ("dog",)
    assert len(outer.records) == 2 * len(alone.records) and outer.words == ("cat",)
    assert [record.run for record in outer.records] == [number for number in (0, 1) for _ in alone.records]
    for number in (0, 1):
        torch.testing.assert_close(outer.heat_map("cat", run=number), alone.heat_map("cat"))
    assert not torch.allclose(inner.heat_map("dog"), alone.heat_map("cat"), atol=1e-5)


def test_a_processor_without_sdpa_is_named():
    pipe, options = animatediff()
    pipe.unet.set_attn_processor(AttnProcessor())
    with (
        pytest.raises(cvg.ArgumentError, match="AttnProcessor does not call scaled_dot_product_attention"),
        cvg.capture(pipe, words=["cat"]),
    ):
        run(pipe, options)


def test_a_capture_is_opened_once():
    pipe, options = animatediff()
    with cvg.capture(pipe, words=["cat"]) as captured:
        run(pipe, options)
    with pytest.raises(cvg.ArgumentError, match="has been open already"):
        captured.__enter__()


def test_an_unknown_denoiser_is_refused():
    pipe, _ = animatediff()
    pipe.unet = torch.nn.Linear(1, 1)
    with pytest.raises(cvg.ArgumentError, match="must be one of UNetMotionModel, UNet3DConditionModel, "):
        cvg.capture(pipe, words=["cat"]).__enter__()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"words": "cat"}, "words must be a list of words"),
        ({"words": []}, "words must name at least one"),
        ({"words": None}, "words must be given unless temporal=True"),
        ({"words": ["cat"], "keep": "disk"}, "keep must be 'cpu' or 'device', got 'disk'"),
        ({"words": ["cat"], "head_reduction": "max"}, "head_reduction must be"),
    ],
)
def test_arguments_are_checked(arguments, message):
    pipe, _ = animatediff()
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.capture(pipe, **arguments)


def test_a_selection_without_layers_is_refused():
    pipe, _ = animatediff()
    with pytest.raises(cvg.ArgumentError, match="selects no layer"):
        cvg.capture(pipe, words=["cat"], layers="nowhere").__enter__()


def test_a_copy_of_a_captured_pipeline_is_one_of_its_own():
    """Nothing of it is recorded, and it may be captured beside the original."""
    pipe, options = animatediff()
    with cvg.capture(pipe, words=["cat"]) as captured:
        other = copy.copy(pipe)
        run(other, options)
        assert type(other) is AnimateDiffPipeline and not captured.records
        with cvg.capture(other, words=["dog"]) as beside:
            run(other, options)
        assert beside.records and not captured.records
        run(pipe, options)
    assert len(captured.records) == len(beside.records)
    assert type(other) is type(pipe) is AnimateDiffPipeline
