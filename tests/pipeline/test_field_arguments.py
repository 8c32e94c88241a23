"""What people pass: every argument that does not fit is named when it is given, and everything says what it is."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from tests.pipelines import PIPELINES, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = math.nan

CAPTURE = [
    ("words", [5, "cat", b"cat", {"cat": 1}, [], [5], [None], [b"cat"], [["cat"]], [""], [" "]]),
    ("words", [[("cat",)], [("cat", 1, 2)], [("cat", "x")], [("cat", -1)], [("cat", NAN)], [("cat", True)]]),
    ("prompt", [5, [], [5], {"a": 1}]),
    ("layers", ["*", 5, b"x", [5], [], ["mid_block"], lambda name: False]),
    ("steps", [-1, [-1], [], [0.5], "0", [True], NAN, range(0), range(-3, 0), torch.tensor(0)]),
    ("keep", [None, "gpu", 5, ["cpu"]]),
    ("head_reduction", [None, "max", 5]),
    ("backend", [None, "cuda9", 5, []]),
    *((flag, ["yes", 2, None]) for flag in ("temporal", "gradients", "own_loop")),
]
COMMON = {
    "start": [-0.1, 1.1, NAN, "x", None, True],
    "stop": [-0.1, 1.1, NAN, "x", None],
    "backend": [None, "cuda9", 5, []],
}
METHODS = {
    "Vico": {
        "words": ["cat", 5, [], [5], [("cat",)], {"cat": 1}],
        "flow": ["x", None, []],
        "temperature": [0, -1, NAN, math.inf, "x", None],
        "residual": ["x", 5],
        "combine": ["x", None],
        "loss": ["x", None],
        "sharpness": [0, NAN, "x"],
        "levels": ["x", 5, None, [], [5], [(5,)], [("a", "b")]],
        "step_rule": ["x", None],
        "step_size": [-1, NAN, math.inf, "x", None],
        "iterations": [-1, 0.5, "3", True, None, {0: -1}, {"a": 1}, {-1: 2}, {0.5: 1}],
        "thresholds": [NAN, "x", None, {0: NAN}, {"x": 1.0}],
        **{flag: ["no", 1, None] for flag in ("normalize", "spatial", "step_decay")},
    },
    "VSTAR": {
        "sigma": [0, -1, NAN, math.inf, True, "x", [1.0], {}, {64: -1}, {64: NAN}, {64: "x"}, {"a": 1.0}],
        "strength": [NAN, math.inf, "x", None],
        "prompts": ["no such file", 5, [], [5], [""], {"a": 1}, b"x"],
        "hold": [0, 1.5, NAN, "2", True],
        "trained_frames": [1, 0, 2.5, "16", NAN],
    },
    "Gen1": {
        "temporal_scale": [NAN, math.inf, "x", True],
        "structure": [-1, 8, 2.0, "x", True],
        "content": [5, [], "absent.png", {}],
    },
    "TemporalBand": {
        "loss": ["x"],
        "sigma": [0, NAN, "x"],
        "step_rule": ["x"],
        "step_size": [-1, NAN],
        "iterations": [-1, 1.5, None],
    },
    "CVG": {
        "classifier": [5, []],
        "label": [5, [5], {"a": 1}, {5: "left"}],
        "step_size": [-1, NAN, "x"],
        "iterations": [-1, 0.5, None],
        "normalize": ["no"],
    },
}
CASES = [
    pytest.param(kind, name, value, id=f"{kind}-{name}-{value!r}")
    for kind, arguments in METHODS.items()
    for name, values in {**arguments, **COMMON}.items()
    for value in values
]


@pytest.fixture(scope="module")
def built():
    return PIPELINES["animatediff"].build()


@pytest.mark.parametrize(("name", "values"), CAPTURE, ids=[name for name, _ in CAPTURE])
def test_arguments_of_capture(built, name, values):
    for value in values:
        with pytest.raises(cvg.ArgumentError, match=rf"^(a |what )?{name}"):
            cvg.capture(built[0], **{"words": ["cat"], name: value}).__enter__()


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_arguments_of_methods(kind, name, value):
    with pytest.raises(cvg.ArgumentError, match=rf"^(a step of )?{name}"):
        getattr(cvg, kind)(**{name: value})


@pytest.mark.parametrize("methods", [(), 5, None, (5,), (cvg.Vico,)], ids=repr)
def test_arguments_of_together(methods):
    with pytest.raises(cvg.ArgumentError, match="^methods must hold"):
        cvg.Together(methods)


def test_together_takes_what_holds_methods():
    one, other = cvg.Gen1(), cvg.VSTAR()
    assert cvg.Together(one).methods == (one,)
    assert cvg.Together((cvg.Together([one]), other)).methods == (one, other)
    assert cvg.Together(iter([one, other])).methods == (one, other)


@pytest.mark.parametrize("pipe", [None, "pipe", torch.nn.Linear(1, 1)], ids=type)
def test_what_is_no_pipeline(pipe):
    for attach in (lambda one: cvg.capture(one, words=["cat"]), cvg.Gen1().attach, cvg.use_processors):
        with pytest.raises(cvg.ArgumentError, match="^pipe must"):
            attach(pipe)


def test_arguments_of_attach_and_of_the_swap(built):
    pipe, _ = built
    for prompt in (5, [], [5], {"a": 1}):
        with pytest.raises(cvg.ArgumentError, match="^prompt must be a text"):
            cvg.Gen1().attach(pipe, prompt=prompt)
    for methods in (5, [5], [], [cvg.Vico]):
        with pytest.raises(cvg.ArgumentError, match="^methods must"):
            cvg.PipelineSession(pipe, methods)
    with pytest.raises(cvg.ArgumentError, match="^backend must be one of"):
        cvg.use_processors(pipe, backend="cuda9")


def test_more_prompts_than_videos_are_refused(built):
    pipe, options = built
    with torch.no_grad():
        embeddings, negative = pipe.encode_prompt("a cat", "cpu", 1, True)
    given = {"prompt_embeds": embeddings, "negative_prompt_embeds": negative}
    captured = cvg.capture(pipe, words=["cat"], prompt=["a cat", "a cat"])
    with pytest.raises(cvg.ArgumentError, match="prompt must name one text for each of the 1 videos, got 2"), captured:
        run(pipe, options, None, **given)


def test_words_of_a_function_are_checked_as_given_ones(built):
    pipe, options = built
    for returned in ([], 5, "cat"):
        method = cvg.Vico(words=lambda prompt, returned=returned: returned)
        with pytest.raises(cvg.ArgumentError, match="^what words returned must"), method.attach(pipe):
            run(pipe, options)


def test_arguments_of_heat_maps(built):
    pipe, options = built
    words = iter(["cat", "dog"])  # whatever can be gone through
    with cvg.capture(pipe, words=words, steps=iter([0, 1])) as captured:
        run(pipe, options)
    assert {record.step for record in captured.records} == {0, 1}
    wanted = captured.heat_map("cat")
    assert torch.equal(captured.heat_map("Cat"), wanted) and torch.equal(captured.heat_map(("cat", 0)), wanted)
    assert captured.heat_map("cat", size=[6, 6]).shape == (4, 6, 6)
    wrong = {
        "word": ["bird", 5, None, "", b"cat", ("cat",), ("cat", "x"), ("cat", 1)],
        "occurrence": [1, -1, "0", None, NAN],
        "branch": ["positive", None, 5, ["cond"]],
        "sample": [7, -2, "0", None, 0.5, NAN, True],
        "size": [(0, 5), (5,), 5, "5", (5.5, 5), (-1, 5), (True, 5)],
        "run": [1, -2, "0", None, NAN, 0.0],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(
                cvg.ArgumentError, match=r"^words?\b" if name in ("word", "occurrence") else f"^{name}"
            ):
                captured.heat_map(**{"word": "cat", name: value})


def test_a_word_in_chinese_and_one_in_the_plural():
    """Through the whole of a pipeline; the rules of words are tested with the tokens."""
    pipe, options = PIPELINES["animatediff"].build()
    pipe.tokenizer.add_tokens(["猫", "狗", "和", "boats"])
    with cvg.capture(pipe, words=["猫"]) as captured:
        run(pipe, options, "猫和狗", num_inference_steps=1)
    assert [span.ids for span in captured.tokens[0]] == [(1,)]
    with cvg.capture(pipe, words=["boat"]) as captured:
        run(pipe, options, "a red boats", num_inference_steps=1)
    assert [span.ids for span in captured.tokens[0]] == [(3,)]


@pytest.mark.parametrize("name", ["capture", "processors", "use_processors"])
def test_functions_say_how_they_are_called(name):
    function = getattr(cvg, name)
    assert next(iter(inspect.signature(function).parameters)) == "pipe"
    assert function.__name__ == name and len(inspect.getdoc(function).splitlines()) > 0


def test_the_package_is_typed():
    assert (Path(cvg.__file__).parent / "py.typed").is_file()


def test_what_is_made_says_what_it_is(built):
    pipe, options = built
    swap = cvg.use_processors(pipe)
    assert repr(swap) == "ProcessorSwap(21 layers)"
    swap.restore()
    captured = cvg.capture(pipe, words=["cat"])
    with captured:
        run(pipe, options, num_inference_steps=1)
    assert repr(captured).startswith("Capture(cat: 14 records")
    assert repr(cvg.Gen1()).startswith("Gen1(start=0.0")


@pytest.mark.parametrize("frames", [32, 33, 48])
def test_clips_longer_than_the_table_of_positions(built, frames):
    """VSTAR squeezes them into the positions that the motion module knows, of which it has 32."""
    pipe, options = built
    call = {**options, "num_frames": frames, "num_inference_steps": 1, "output_type": "latent"}
    with cvg.VSTAR(sigma=None, trained_frames=16).attach(pipe):
        assert run(pipe, call).shape[2] == frames
    if frames > 32:
        with pytest.raises(RuntimeError, match="size of tensor"):
            run(pipe, call)
