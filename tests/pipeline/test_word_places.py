"""Where the words of a prompt stand in the text that a denoiser is given, against what its text encoder returned.

A token of a word is a row of the denoiser's text that equals a hidden state of that word's id, within the prompt.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.pipeline.prompt import RunPrompt  # noqa: E402
from tests.pipeline.word_oracle import check, seen  # noqa: E402
from tests.pipelines import PIPELINES, PROMPT, run  # noqa: E402
from tests.pipelines.parts import TOKENS, word_tokenizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

#: Pipelines that put a prompt into a template, crop, select or pad on the left.
TEMPLATES = [
    "hunyuan_video",
    "hunyuan_video_true_cfg",
    "hunyuan_video_i2v",
    "hunyuan_skyreels_i2v",
    "framepack",
    "hunyuan_video15",
    "kandinsky5",
    "easyanimate",
    "cosmos2_5",
    "sana_video_instruction",
    "ltx2",
]
WORDS = ["cat", "dog", "red", "blue", ("a", 1)]
OTHER = "a dog and a cat running"


def repeats_of(pipe: Any) -> str:
    known = inspect.signature(pipe.__call__).parameters
    return next(name for name in ("num_videos_per_prompt", "num_images_per_prompt") if name in known)


def bypassed(name: str, pipe: Any) -> None:
    """LTX 2's connectors mix the tokens: the rows before them are looked at; see the test of the connectors."""
    if name == "ltx2":
        pipe.connectors.register_forward_hook(lambda module, args, output: (args[0], *output[1:]))


@pytest.mark.parametrize(
    "name", [n for n, case in PIPELINES.items() if n not in ("svd", "animatediff_freenoise_prompts")]
)
@pytest.mark.drawn(7)
def test_words_of_every_pipeline(name):
    pipe, options = PIPELINES[name].build()
    if "prompt" in options:
        options["prompt"] = PROMPT
    bypassed(name, pipe)
    check(seen(name, pipe, options), [PROMPT], WORDS, pipe)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_not_the_prompt(name):
    """Its words are not found; those of a prompt that speaks as it does are found in the prompt."""
    pipe, options = PIPELINES[name].build()
    bypassed(name, pipe)
    with pytest.raises(cvg.ArgumentError, match="'video' is not in the prompt; the words there: a"):
        seen(name, pipe, options).prompt.texts()[0].find(["video"])
    prompt = "describe the video user assistant cat"
    found = seen(name, pipe, options, prompt=prompt)
    check(found, [prompt], prompt.split(), pipe)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", ["wan", *TEMPLATES])
def test_a_prompt_that_was_cut_off(name):
    pipe, options = PIPELINES[name].build()
    bypassed(name, pipe)
    prompt = "a red cat and a blue dog " * 60 + "running"
    check(seen(name, pipe, options, prompt=prompt), [prompt], ["cat"], pipe)
    with pytest.raises(cvg.ArgumentError, match="'running' lies beyond the"):
        seen(name, pipe, options, prompt=prompt).prompt.texts()[0].find(["running"])


#: Pipelines that make one video a call, by their own words or by crashing.
_SINGLE = ("hunyuan_video_i2v", "hunyuan_skyreels_i2v", "framepack")


@pytest.mark.parametrize("name", [n for n in ["wan", *TEMPLATES] if n not in _SINGLE])
def test_two_prompts_and_two_videos_of_each(name):
    pipe, options = PIPELINES[name].build()
    bypassed(name, pipe)
    prompts = [PROMPT, OTHER]
    if "negative_prompt" in options:
        options["negative_prompt"] = [options["negative_prompt"]] * 2
    each = 1 if name in ("kandinsky5", "cosmos2_5") else 2  # these two do not run with more
    found = seen(name, pipe, options, prompt=prompts, **{repeats_of(pipe): each})
    check(found, [PROMPT] * each + [OTHER] * each, ["cat", "dog"], pipe)


#: What `encode_prompt` returns, by the names that the pipeline takes it by.
_BOTH = ("prompt_embeds", "negative_prompt_embeds")
_MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
RETURNED = {
    "wan": _BOTH,
    "cogvideox": _BOTH,
    "cosmos2_5": _BOTH,
    "hunyuan_video": ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
    "hunyuan_video15": ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"),
    "kandinsky5": ("prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens"),
    "easyanimate": (*_BOTH, "prompt_attention_mask", "negative_prompt_attention_mask"),
    "sana_video_instruction": _MASKED,
    "ltx2": _MASKED,
}


@pytest.mark.parametrize("name", RETURNED)
def test_embeddings_instead_of_a_prompt(name):
    """`prompt=` says what they mean; the text encoder need not be there."""
    pipe, options = PIPELINES[name].build()
    bypassed(name, pipe)
    usual = seen(name, pipe, options)
    if "negative_prompt_embeds" in RETURNED[name]:
        options["negative_prompt"] = None
    if name in ("wan", "cogvideox", "hunyuan_video", "sana_video_instruction"):
        pipe.text_encoder = pipe.text_encoder_2 = None
    given = dict(zip(RETURNED[name], usual.encoded[0], strict=True))
    found = seen(name, pipe, {**options, **given}, own=PROMPT, prompt=None)
    assert torch.equal(found.text, usual.text)
    places, wanted = ([text.find(WORDS) for text in one.prompt.texts()] for one in (found, usual))
    assert places == wanted
    with pytest.raises(cvg.ArgumentError, match="given prompt_embeds: pass prompt="):
        seen(name, pipe, {**options, **given}, prompt=None).prompt.texts()


# Several calls of encode_prompt.


class Calls:
    """Stands for a pipeline: what is encoded is said by the test."""

    def __init__(self):
        self.tokenizer = word_tokenizer(TOKENS)

    def encode_prompt(self, prompt=None):
        raise NotImplementedError


@pytest.mark.parametrize("first", [True, False])
def test_the_prompts_encoding_is_known_among_others(first):
    prompt = RunPrompt(Calls(), {"prompt": PROMPT}, None)
    own, other = torch.randn(2, 1, 5, 4)
    calls = [({"prompt": [PROMPT]}, (own, own[:, 0])), ({"prompt": "running"}, (other, None))]
    for arguments, result in calls if first else calls[::-1]:
        prompt.note_encoding(arguments, result)
    assert prompt.embeddings is own and prompt.negative is other
    prompt.note_encoding({"prompt": PROMPT}, torch.randn(1, 5, 4))
    assert prompt.embeddings is own and prompt.negative is other


def test_a_prompt_that_the_pipeline_rewrites():
    """Words are those of what is encoded; tokens that nobody encoded are not taken for them."""
    pipe, options = PIPELINES["hunyuan_video"].build()
    encoding = {name: options[name] for name in ("prompt_template", "max_sequence_length")}
    encoding["prompt"] = "a red cat"
    prompt = RunPrompt(pipe, {"prompt": "cat"}, None)
    prompt.note_encoding(encoding, (torch.zeros(1, 16, 16),))
    assert [span.ids for span in prompt.texts()[0].find(["red", "cat"])] == [(1,), (2,)]
    prompt = RunPrompt(pipe, {"prompt": "cat"}, None)
    prompt.note_encoding(encoding, (torch.zeros(1, 16, 16),))
    prompt.live.note("text_encoder", torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(cvg.ArgumentError, match="was given other tokens than those of the prompt"):
        prompt.texts()


def test_a_negative_prompt_beside_embeddings_is_not_the_prompt():
    own, other = torch.randn(2, 1, 5, 4)
    prompt = RunPrompt(Calls(), {"prompt_embeds_qwen": own}, PROMPT)
    prompt.note_encoding({"prompt": "running"}, (other, None))
    assert prompt.embeddings is own and prompt.negative is other


# Where the tokens cannot be followed.


def test_what_cannot_be_followed_is_refused_with_the_remedy():
    pipe, options = PIPELINES["wan"].build()
    stock = type(pipe).encode_prompt

    class Mixing(type(pipe)):
        def encode_prompt(self, *args, **kwargs):
            made = stock(self, *args, **kwargs)
            return tuple(None if one is None else one.cumsum(1)[:, 1:] for one in made)

    pipe.__class__ = Mixing
    with (
        pytest.raises(cvg.ArgumentError, match="not known of Mixing: .* words=.TokenSpan"),
        cvg.capture(pipe, ["cat"]),
    ):
        run(pipe, options)
    with cvg.capture(pipe, [cvg.TokenSpan("cat", 0, (2,))]) as captured:
        run(pipe, options)
    assert {record.words for record in captured.records} == {("cat",)}


@pytest.mark.parametrize("places", [(), (-1,), ("cat",)])
def test_places_that_are_none(places):
    with pytest.raises(cvg.ArgumentError, match="a TokenSpan must have places from 0"):
        cvg.capture(object(), [cvg.TokenSpan("cat", 0, places)])


def test_a_pipeline_without_a_text():
    pipe, options = PIPELINES["svd"].build()
    prompt = RunPrompt(pipe, options, None)
    assert prompt.samples == 1
    assert RunPrompt(pipe, {"image": [1, 2], "num_videos_per_prompt": 3}, None).samples == 6
    with pytest.raises(cvg.ArgumentError, match="not known of StableVideo.*: it has no tokenizer"):
        prompt.texts()
