"""`cvg-kernels generate`: everything it promises to write, and nothing after an error."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from PIL import Image, ImageSequence  # noqa: E402

from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.generate import Job, load_pipeline  # noqa: E402
from cvg_kernels.guidance.methods import METHODS  # noqa: E402
from cvg_kernels.shapes.pipeline import WEIGHTS  # noqa: E402
from tests import offline_pipelines  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "a red circle moving left and a blue square moving right"
SHOWN = (8, 128, 128, 3)  # a clip of the shapes pipeline in a file; its 64 × 64 pixels are enlarged


def pixels_of(path) -> np.ndarray:
    """The frames of a GIF, `[F, H, W, 3]`."""
    with Image.open(path) as clip:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(clip)])


def rows_of(path, height: int) -> list[np.ndarray]:
    """Both rows of frames of a contact sheet or of heat maps, without the labels above them."""
    with Image.open(path) as sheet:
        return [row[-height:] for row in np.split(np.asarray(sheet.convert("RGB")), 2)]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """How far apart pictures are on the mean, in bytes; a GIF, of 256 colours, is a little off what it shows."""
    return np.abs(one.astype(float) - other).mean()


@pytest.mark.drawn(8, of="long tests")
def test_the_main_job(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["generate", PROMPT, "--guidance", "vico", "--output", str(output), "--steps", "4"]) == 0
    written = {path.name for path in output.iterdir()}
    assert written >= {
        "unguided.gif",
        "guided.gif",
        "contact_sheet.png",
        "heat_maps_unguided.png",
        "heat_maps_guided.png",
        "index.html",
        "loss.png",
        "report.json",
    }
    report = json.loads((output / "report.json").read_text())
    assert set(report["files"]) == written
    assert report["words"] == ["red", "circle", "blue", "square"]
    assert report["job"]["seed"] == 0 and report["job"]["prompt"] == PROMPT
    assert {"load", "unguided", "guided", "write"} <= set(report["seconds"])
    assert report["peak_memory_mib"] > 0
    assert [entry["step"] for entry in report["loss"]] == sorted(e["step"] for e in report["loss"])
    assert set(report["oracle"]) == {"unguided", "guided"}
    assert report["guided_steps"] == 1  # 0.15 of 4 steps, rounded up
    table = capsys.readouterr().out
    assert "unguided" in table and "guided steps: 1" in table and "peak memory" in table
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no scratch is left behind


@pytest.mark.drawn(8, of="long tests")
def test_clips_are_what_the_sheet_shows(tmp_path):
    assert main(["generate", PROMPT, "--output", str(tmp_path / "out"), "--steps", "2"]) == 0
    rows = rows_of(tmp_path / "out" / "contact_sheet.png", 128)
    for name, row in zip(("unguided", "guided"), rows, strict=True):
        clip = pixels_of(tmp_path / "out" / f"{name}.gif")
        assert clip.shape == SHOWN and row.shape == (128, 8 * 128, 3)
        assert apart(row, np.concatenate(list(clip), axis=1)) < 8


SPECS = [None, "cvg", "vico", "vstar", "gen1", "temporal-band", "flowmo", "vico+temporal-band", "cvg+vstar+gen1"]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.drawn(8, of="long tests")
def test_every_method_writes_its_results(spec, tmp_path):
    """The default is CVG; methods without words or losses have pictures too."""
    assert {part for one in SPECS if one for part in one.split("+")} == set(METHODS) - {"none"}
    given = [] if spec is None else ["--guidance", spec]
    out = tmp_path / "out"
    assert main(["generate", PROMPT, *given, "--steps", "2", "--output", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["guided_steps"] > 0
    names = {"guided.gif", "unguided.gif", "heat_maps_guided.png"}
    moves = spec is None or {"cvg", "vico", "temporal-band", "flowmo"} & set(spec.split("+"))
    assert {path.name for path in out.iterdir()} >= names | ({"loss.png"} if moves else set())
    assert bool(report["loss"]) == bool(moves)
    if spec is None:
        assert "classifier" not in report["job"] and report["job"]["guidance"] is None


@pytest.mark.drawn(8, of="long tests")
def test_a_run_that_guided_nothing_is_told(tmp_path, capsys):
    """Its clips are kept, both the same."""
    out = tmp_path / "out"
    arguments = ["--guidance", "vico:stop=0.0", "--steps", "2", "--output", str(out)]
    assert main(["generate", PROMPT, *arguments]) == 2
    printed = capsys.readouterr()
    assert "guided steps: 0" in printed.out and "no denoising step was guided" in printed.err
    clip = pixels_of(out / "guided.gif")
    assert clip.shape == SHOWN and apart(clip, pixels_of(out / "unguided.gif")) < 1


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("spec", ["vico:step_size=1e30", "gen1:temporal_scale=1e30"])
def test_a_clip_of_nan_is_told(spec, tmp_path, capsys):
    arguments = ["--guidance", spec, "--steps", "2", "--output", str(tmp_path / "out")]
    assert main(["generate", PROMPT, *arguments]) == 2
    assert "infinite" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.drawn(8, of="long tests")
def test_clips_are_kept_if_a_picture_fails(tmp_path, monkeypatch):
    from cvg_kernels import viz

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(viz, "overlay", fail)
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        main(["generate", PROMPT, "--steps", "2", "--output", str(out)])
    guided, unguided = (pixels_of(out / f"{name}.gif") for name in ("guided", "unguided"))
    assert guided.shape == unguided.shape == SHOWN and not np.array_equal(guided, unguided)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.drawn(5)
@pytest.mark.parametrize("name", offline_pipelines.BUILDERS)
def test_other_models(name, tmp_path):
    """A pipeline in a folder, by its size and length; the heat maps fit the video's frames."""
    pipe, options = offline_pipelines.BUILDERS[name]()
    pipe.save_pretrained(tmp_path / "model")
    frames = options.get("num_frames", options.get("video_length"))
    size = [f"--{side}={options[side]}" for side in ("height", "width")]
    model = ["--model", str(tmp_path / "model"), "--guidance", "vico"]
    arguments = [*model, "--words", "cat", "--steps", "2", *size]
    out = tmp_path / "out"
    given = [offline_pipelines.PROMPT, *arguments, f"--frames={frames}", "--output", str(out)]
    assert main(["generate", *given]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["oracle"] == {} and len(report["loss"]) > 0
    times = -(-128 // min(options["height"], options["width"]))  # small frames are enlarged
    clip, heat = rows_of(out / "heat_maps_guided.png", times * options["height"])
    assert clip.shape == heat.shape == (times * options["height"], times * options["width"] * frames, 3)
    assert apart(clip, heat) > 8


@pytest.mark.drawn(8, of="long tests")
def test_a_prompt_of_two_states(tmp_path):
    """The synopsis of a prompt with "then"; each half of the clip is judged by its own state."""
    prompt = "a red circle moving left, then a blue circle moving left"
    guidance = "vstar:prompts=then:hold=2:sigma=None:trained_frames=8"
    arguments = [prompt, "--guidance", guidance, "--frames", "12", "--steps", "3"]
    assert main(["generate", *arguments, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["words"] == ["red", "circle", "blue", "circle"]
    assert report["oracle"]["guided"].keys() == {"present", "bound", "direction", "all_right"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a dog"], "prompt does not fit the shapes pipeline"),
        ([f"{PROMPT}, then a dog"], "'a dog' is not of the form 'a COLOUR SHAPE moving"),
        (["then"], "prompt does not fit the shapes pipeline"),
        (["  "], "prompt must not be empty"),
        ([PROMPT, "--words", "dog"], "'dog' is not in the prompt; the words there: a, red, circle"),
        (
            [PROMPT, "--guidance", "magic"],
            "guidance must be one of none, cvg, vico, vstar, gen1, temporal-band, flowmo, got 'magic'",
        ),
        ([PROMPT, "--model", "some/model"], "--guidance must be given with --model: cvg:classifier="),
        ([PROMPT, "--guidance", "none"], "--guidance must be a method, got 'none'"),
        ([PROMPT, "--guidance", ""], "guidance must be one of none, cvg"),
        ([PROMPT, "--frames", "40"], "--frames must be at most 32 with this model, got 40"),
        ([PROMPT, "--guidance-scale", "nan"], "--guidance-scale must be finite, got nan"),
        ([PROMPT, "--height", "32"], "--height and --width must be 64 with the shapes pipeline"),
        ([PROMPT, "--steps", "0"], "--steps must be at least 1, got 0"),
        ([PROMPT, "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16"),
        ([PROMPT, "--device", "abacus"], "--device 'abacus' cannot be used"),
        ([PROMPT, "--model", "no/such-model", "--guidance", "vico"], "--model 'no/such-model' cannot be loaded"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, tmp_path, capsys):
    assert main(["generate", *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    last = error.splitlines()[-1]
    assert last.startswith("cvg-kernels generate: ") and message in last
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output, message in (
        (tmp_path / "file", "--output must be a folder"),
        (tmp_path / "no" / "where", "--output must lie in a folder that exists"),
    ):
        assert main(["generate", PROMPT, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("folder", [None, WEIGHTS], ids=["shapes", "folder"])
def test_weights_are_in_the_dtype_asked_for(folder, tmp_path):
    job = Job(PROMPT, tmp_path / "out", model=folder and str(folder), dtype="bfloat16")
    pipe = load_pipeline(job)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        assert {weight.dtype for weight in part.parameters()} == {torch.bfloat16}


@pytest.mark.drawn(8, of="long tests")
def test_a_local_folder_as_model(tmp_path):
    """Any pipeline folder works, without verdicts of the oracle."""
    code = main(
        [
            "generate",
            "a red circle, slowly",
            "--model",
            str(WEIGHTS),
            "--height",
            "64",
            "--width",
            "64",
            "--steps",
            "2",
            "--words",
            "circle",
            "--guidance",
            "vico",
            "--output",
            str(tmp_path / "out"),
        ]
    )
    assert code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["oracle"] == {}
