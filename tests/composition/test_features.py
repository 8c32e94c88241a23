"""Entities of prompts, and their maps per layer and head."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.composition import Selection, entities_of, with_context  # noqa: E402
from cvg_kernels.prompts.token_table import TokenTable  # noqa: E402
from cvg_kernels.prompts.tokens import EncodedText  # noqa: E402
from cvg_kernels.training.record import record  # noqa: E402
from tests.offline_pipelines import BUILDERS, PROMPT, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = ("left", "right", "up", "down")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("one", "two", "three", "none")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle moving left", [("red circle", 0, "left")]),
        (
            "A red circle moving left and a blue square moving UP.",
            [("red circle", 0, "left"), ("blue square", 0, "up")],
        ),
        ("a red circle moving up and a red circle moving down", [("red circle", 0, "up"), ("red circle", 1, "down")]),
        ("the old car is going to the right, a dog", [("old car", 0, "right"), ("dog", 0, None)]),
        (PROMPT, [("red cat", 0, None), ("blue dog", 0, None)]),
        ("a left shoe", [("left shoe", 0, None)]),
    ],
)
def test_entities(prompt, expected):
    found = [(*entity.phrase, entity.label) for entity in entities_of(prompt, LABELS)]
    assert found == expected


@pytest.mark.parametrize(
    ("prompt", "labels", "expected"),
    [
        ("a red circle left of two blue squares", RELATIONS, [("red circle", "left of"), ("blue squares", None)]),
        ("the circle Above the circle", RELATIONS, [("circle", "above"), ("circle", None)]),
        ("a cat left of a dog and a bird", RELATIONS, [("cat", "left of"), ("dog", None), ("bird", None)]),
        ("a red circle left of two blue squares", NUMBERS, [("red circle left of two blue squares", "one")]),
        ("Two cats, a dog and three birds", NUMBERS, [("cats", "two"), ("dog", "one"), ("birds", "three")]),
        ("two cats moving left", (*NUMBERS, *LABELS), [("cats", "left")]),
        ("circles", NUMBERS, [("circles", None)]),
    ],
)
def test_relations_and_numbers(prompt, labels, expected):
    assert [(entity.name, entity.label) for entity in entities_of(prompt, labels)] == expected


def test_a_relation_tells_occurrences_apart():
    assert [entity.phrase for entity in entities_of("a circle above a circle", RELATIONS)] == [
        ("circle", 0),
        ("circle", 1),
    ]


def test_the_word_of_the_label_is_withheld():
    for entity in entities_of("a red circle moving left while a cross moves down", LABELS):
        assert not {"left", "down", "moving", "moves"} & set(entity.name.split())


def test_a_prompt_without_entities():
    with pytest.raises(cvg.ArgumentError, match="prompt must name something"):
        entities_of(" , ", LABELS)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("name", list(BUILDERS))
def test_maps_are_those_of_capture(name):
    """Against `cvg.capture` on the same run: the sum over an entity's tokens, per head, resized."""
    pipe, options = BUILDERS[name]()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    selection = Selection.of(denoiser, (4, 6, 6))
    phrases = [[entity.phrase for entity in entities_of(PROMPT, LABELS)]]
    seed = torch.Generator().manual_seed(0)
    call = {**options, "num_inference_steps": 3, "generator": seed}
    maps, timesteps, video = record(pipe, [PROMPT], phrases, selection, steps=2, video=False, **call)
    assert video is None and len(timesteps) == 2
    assert maps.shape == (1, 2, 2, selection.maps, 4, 6, 6)

    with cvg.capture(pipe, words=["red cat", "blue dog"], head_reduction="none") as captured:
        run(pipe, options)
    for step in range(2):
        records = {r.layer: r.maps for r in captured.records if r.step == step and r.branch == "cond"}
        expected = [
            interpolate(records[layer][0], (4, 6, 6), mode="trilinear", align_corners=False)
            for layer in selection.layers  # [heads, K, F, h, w]
        ]
        expected = torch.cat(expected).transpose(0, 1)  # [K, M, F, h, w]
        torch.testing.assert_close(maps[0, step], expected, rtol=1e-4, atol=1e-6)


def test_places_name_each_map():
    selection = Selection(("one", "two"), (2, 3), (1, 1, 1))
    layer, head = selection.places()
    assert selection.maps == 5
    assert layer.tolist() == [0, 0, 1, 1, 1] and head.tolist() == [0, 1, 0, 1, 2]


def test_no_layer_is_an_error():
    pipe, _ = BUILDERS["animatediff"]()
    with pytest.raises(cvg.ArgumentError, match="layers selects no"):
        Selection.of(pipe.unet, (4, 4, 4), lambda name: False)


def test_context_is_the_sum_of_the_others():
    maps = torch.rand(2, 3, 4, 1, 2, 2)
    both = with_context(maps)
    torch.testing.assert_close(both[:, 1, 0], maps[:, 1])
    torch.testing.assert_close(both[:, 1, 1], maps[:, 0] + maps[:, 2])


def test_prompts_of_different_lengths_are_padded():
    pipe, _ = BUILDERS["animatediff"]()
    phrases = {PROMPT: [("red cat", 0), ("dog", 0)], "a dog": [("dog", 0)]}
    table = TokenTable.of(
        [EncodedText.of_prompt(pipe.tokenizer, prompt).find(each) for prompt, each in phrases.items()]
    )
    assert table.present.tolist() == [[True, True], [True, False]]
    assert table.membership.sum((1, 2)).tolist() == [3, 1]
