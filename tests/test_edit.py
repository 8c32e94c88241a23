"""`cvg-kernels edit`: everything it promises to write, and nothing after an error."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402

from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.edit import EditJob, run, verdict  # noqa: E402
from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.shapes import editor  # noqa: E402
from cvg_kernels.shapes.world import Motion, Scene, Thing, random_scene, render  # noqa: E402
from cvg_kernels.viz import save_gif, save_mp4  # noqa: E402
from tests.editing.tiny import tiny_editor  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "a blue square"
WRITTEN = {
    "input.gif",
    "input.mp4",
    "structure.gif",
    "structure.mp4",
    "edited.gif",
    "edited.mp4",
    "contact_sheet.png",
    "report.json",
}


@pytest.fixture(scope="module")
def untrained():
    """An editor with random weights; what it makes is nothing to look at."""
    return tiny_editor()


@pytest.fixture(autouse=True)
def given_editor(untrained, monkeypatch):
    """The untrained editor stands for the one that ships."""
    monkeypatch.setattr(editor, "load_editor", lambda *_: untrained)


@pytest.fixture
def clip(tmp_path):
    """A clip of the shapes world as a GIF, in a folder of its own."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    frames = render([random_scene(np.random.default_rng())])[0]
    save_gif(frames, folder / "clip.gif")
    return folder / "clip.gif"


def edit(tmp_path, *arguments, code: int = 0) -> dict:
    """Runs the program in two steps and returns its report."""
    out = tmp_path / "out"
    assert main(["edit", *map(str, arguments), "--steps", "2", "--output", str(out)]) == code
    return json.loads((out / "report.json").read_text())


def refused(tmp_path, capsys, *arguments) -> str:
    """Runs what must be refused: one line, and nothing on the disk."""
    out = tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main(["edit", "--steps", "2", "--output", str(out), *map(str, arguments)])
    except SystemExit as error:  # what the parser itself refuses
        code = error.code
    assert code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return printed.err


@pytest.mark.drawn(8, of="long tests")
def test_the_job(clip, tmp_path, capsys):
    arguments = ("--prompt", PROMPT, "--structure", 2, "--temporal-scale", 1.5, "--seed", 7)
    report = edit(tmp_path, clip, *arguments)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == WRITTEN == set(report["files"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "out"]
    job = report["job"]
    assert (job["prompt"], job["structure"], job["temporal_scale"]) == (PROMPT, 2, 1.5)
    assert [method.split("(")[0] for method in report["methods"]] == ["Gen1"]
    assert "temporal_scale=1.5" in report["methods"][0]
    assert job["seed"] == 7 and job["video"] == str(clip)
    assert {"load", "read", "edit", "write"} == set(report["seconds"])
    assert report["guided_steps"] == 2 and report["peak_memory_mib"] > 0
    assert report["input"] == {
        "frames": list(range(8)),
        "notes": ["resized from 128×128 to 64×64"],  # a GIF of ours has large pixels
    }
    assert set(report["oracle"]) == {"before", "after", "colours", "shapes", "distance", "direction"}
    assert report["oracle"]["before"]
    printed = capsys.readouterr().out
    assert "input: resized from" in printed and "written to" in printed
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width == 8 * 128
    for name in ("input", "structure", "edited"):
        with Image.open(out / f"{name}.gif") as image:
            assert image.n_frames == 8


@pytest.mark.drawn(8, of="long tests")
def test_the_clip_is_that_of_the_pipeline(clip, tmp_path, untrained):
    """Settings reach the pipeline's call, to the bit."""
    from cvg_kernels.guidance import Gen1
    from cvg_kernels.video_files import read_video

    seen = {}
    call = type(untrained).__call__

    class Watched(type(untrained)):
        def __call__(self, *given, **options):
            made = call(self, *given, **options)
            seen.update(options, frames=made.frames)
            return made

    untrained.__class__ = Watched
    try:
        job = EditJob(
            tmp_path / "out",
            clip,
            PROMPT,
            structure=5,
            temporal_scale=1.5,
            seed=3,
            steps=2,
            guidance_scale=2.0,
            negative_prompt="a red circle",
        )
        run(job, untrained)
    finally:
        untrained.__class__ = Watched.__mro__[1]
    with Gen1(temporal_scale=1.5).attach(untrained):
        expected = untrained(
            video=read_video(clip, size=64).frames,
            prompt=PROMPT,
            structure=5,
            guidance_scale=2.0,
            negative_prompt="a red circle",
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(3),
        ).frames
    assert torch.equal(seen["frames"], expected)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("kind", ["mp4", "folder", "portrait"])
def test_inputs_of_any_kind(kind, tmp_path):
    path = tmp_path / "given"
    if kind == "mp4":
        path = tmp_path / "given.mp4"
        save_mp4(torch.rand(30, 3, 60, 100), path)
    else:
        path.mkdir()
        size = (90, 160) if kind == "portrait" else (64, 64)
        for number in range(30):
            Image.effect_noise(size, 60).save(path / f"{number}.png")
    report = edit(tmp_path, path, "--prompt", PROMPT)
    assert report["input"]["frames"] == list(range(0, 24, 3))
    assert report["input"]["notes"][0] == "took 8 of 30 frames: every 3rd from frame 0 on"
    assert (len(report["input"]["notes"]) == 2) == (kind != "folder")
    assert set(report["files"]) == WRITTEN


@pytest.mark.drawn(8, of="long tests")
def test_which_frames_and_how(tmp_path):
    save_gif(torch.rand(30, 3, 128, 160), tmp_path / "clip.gif")
    given = ("--start", 10, "--every", 2, "--frames", 6, "--fit", "pad", "--fps", 10)
    report = edit(tmp_path, tmp_path / "clip.gif", "--prompt", PROMPT, *given)
    assert report["input"]["frames"] == [10, 12, 14, 16, 18, 20]
    assert report["input"]["notes"][1].startswith("padded to a square")
    with Image.open(tmp_path / "out" / "edited.gif") as image:
        assert image.n_frames == 6 and image.info["duration"] == 100
    with Image.open(tmp_path / "out" / "input.gif") as image:
        top = np.asarray(image.convert("RGB"))[:4]
    assert top.max() < 40  # black, up to the colours of a GIF and the sides of the resize


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("prompt", [PROMPT, "a red circle and a blue square", None])
def test_a_clip_of_its_own(prompt, tmp_path, capsys):
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "blue.png")
    content = ("--image", tmp_path / "blue.png") if prompt is None else ("--prompt", prompt)
    report = edit(tmp_path, *content, "--seed", 11)
    assert report["input"]["frames"] is None
    count = 2 if prompt and " and " in prompt else 1
    assert len(report["oracle"]["before"]) == count
    assert report["input"]["notes"][0].startswith("drew a clip: a ")
    assert (report["oracle"]["colours"] is None) == (prompt is None)
    first = (tmp_path / "out" / "input.gif").read_bytes()
    edit(tmp_path, *content, "--seed", 11)
    assert (tmp_path / "out" / "input.gif").read_bytes() == first
    edit(tmp_path, *content, "--seed", 12)
    assert (tmp_path / "out" / "input.gif").read_bytes() != first


def test_many_things_in_the_prompt_are_no_endless_draw(tmp_path):
    prompt = " and ".join(f"a {colour} circle" for colour in ("red", "blue", "green", "yellow"))
    assert len(edit(tmp_path, "--prompt", prompt)["oracle"]["before"]) <= 2


@pytest.mark.drawn(8, of="long tests")
def test_an_image_as_content(clip, tmp_path):
    pixels = np.random.default_rng().integers(0, 256, (40, 70, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "content.png")
    report = edit(tmp_path, clip, "--image", tmp_path / "content.png")
    assert report["input"]["notes"][-2:] == [
        "image: what is transparent is taken as black",
        "image: cut to the square in the middle",
    ]
    first = (tmp_path / "out" / "edited.gif").read_bytes()
    Image.fromarray(255 - pixels[..., :3]).save(tmp_path / "content.png")
    edit(tmp_path, clip, "--image", tmp_path / "content.png")
    assert (tmp_path / "out" / "edited.gif").read_bytes() != first


@pytest.mark.drawn(8, of="long tests")
def test_words_and_further_guidance(clip, tmp_path):
    arguments = ("--prompt", "a red circle and a blue square", "--words", "red,square")
    report = edit(tmp_path, clip, *arguments, "--guidance", "vico:stop=1.0", "--temporal-scale", 2)
    assert set(report["files"]) == WRITTEN | {"heat_maps.png"}
    assert report["job"]["words"] == ["red", "square"]
    assert report["guided_steps"] == 4  # two methods in two steps


@pytest.mark.drawn(8, of="long tests")
def test_the_classifier_of_the_shapes_pipeline_is_taken_to_the_editor(tmp_path):
    out = tmp_path / "out"
    prompt = "a blue square moving left"
    arguments = ["--prompt", prompt, "--structure", "7", "--guidance", "cvg+vico", "--steps", "10"]
    assert main(["edit", *arguments, "--output", str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["guided_steps"] >= 1


def test_guidance_that_guided_nothing_is_told(clip, tmp_path, capsys):
    edit(tmp_path, clip, "--prompt", PROMPT, "--guidance", "vico:stop=0.0", code=2)
    assert "no denoising step was guided" in capsys.readouterr().err


def test_a_depth_model_of_the_users(clip, tmp_path, untrained):
    """It replaces the pipeline's own, whose depth is left unasked."""
    from transformers import DPTImageProcessor

    untrained.depth_estimator.save_pretrained(tmp_path / "inputs" / "depth")
    size = {"height": 64, "width": 64}
    DPTImageProcessor(size=size).save_pretrained(tmp_path / "inputs" / "depth")
    own = untrained.depth_estimator
    untrained.register_modules(depth_estimator=None)
    try:
        depth = ("--depth-model", tmp_path / "inputs" / "depth")
        report = edit(tmp_path, clip, "--prompt", PROMPT, *depth)
    finally:
        untrained.register_modules(depth_estimator=own)
    assert set(report["files"]) == WRITTEN


def test_what_was_in_the_folder_stays(clip, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    edit(tmp_path, clip, "--prompt", PROMPT)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_nothing_is_left_if_writing_fails(clip, tmp_path, monkeypatch):
    from cvg_kernels import viz

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(viz, "contact_sheet", fail)
    with pytest.raises(ZeroDivisionError):
        main(["edit", str(clip), "--prompt", PROMPT, "--steps", "2", "--output", str(tmp_path / "o")])
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


REFUSED = {
    "neither prompt nor image": ((), "--prompt or --image must be given"),
    "empty prompt": (("--prompt", " "), "--prompt must not be empty"),
    "no caption": (("--prompt", "a cat"), "'a COLOUR SHAPE [moving DIRECTION]'"),
    "too much structure": (("--prompt", PROMPT, "--structure", 8), "from 0 to 7, got '8'"),
    "too little structure": (("--prompt", PROMPT, "--structure", -1), "from 0 to 7, got '-1'"),
    "half a level": (("--prompt", PROMPT, "--structure", 2.5), "number from 0 to 7, got '2.5'"),
    "no name of a video": (("", "--prompt", PROMPT), "must be a file or a folder, got ''"),
    "no name of an image": (("--image", ""), "--image: must be a file or a folder, got ''"),
    "no steps": (("--prompt", PROMPT, "--steps", 0), "--steps must be at least 1"),
    "one frame": (("--prompt", PROMPT, "--frames", 1), "--frames must be at least 2"),
    "fit": (("--prompt", PROMPT, "--fit", "stretch"), "--fit must be crop or pad"),
    "fps": (("--prompt", PROMPT, "--fps", 0), "--fps must be at least 1"),
    "scale": (("--prompt", PROMPT, "--temporal-scale", "nan"), "--temporal-scale must be finite"),
    "dtype": (("--prompt", PROMPT, "--dtype", "int8"), "--dtype must be one of"),
    "device": (("--prompt", PROMPT, "--device", "abacus"), "--device 'abacus' cannot be used"),
    "no numbers there": (("--prompt", PROMPT, "--device", "meta"), "--device 'meta' cannot be used"),
    "two scales": (
        ("--prompt", PROMPT, "--temporal-scale", 2, "--guidance", "vico+gen1"),
        "set the same: give one of them, got 2 and 'vico+gen1'",
    ),
    "guidance": (("--prompt", PROMPT, "--guidance", "vic"), "guidance must be one of"),
    "a word that is not there": (("--prompt", PROMPT, "--words", "red"), "red"),
    "words of no prompt": (("--image", "x.png", "--words", "red"), "--words must be those of"),
    "no such image": (("--image", "x.png"), "image must be a file that exists"),
    "no such video": (("x.mp4", "--prompt", PROMPT), "video must be a file or a folder that exists"),
    "an address": (("https://x.org/a.mp4", "--prompt", PROMPT), "on this machine"),
    "too many frames": (("--prompt", PROMPT, "--frames", 999), "--frames must be at most"),
    "infinite": (("--prompt", PROMPT, "--guidance", "gen1:temporal_scale=1e38"), "infinite"),
}


@pytest.mark.parametrize("arguments, part", REFUSED.values(), ids=REFUSED)
def test_bad_arguments(arguments, part, tmp_path, capsys):
    assert part in refused(tmp_path, capsys, *arguments)


def test_bad_inputs(tmp_path, capsys, monkeypatch):
    """The kinds there are stand in test_video_files.py; here, that nothing is written, and no model loaded."""
    monkeypatch.setattr(editor, "load_editor", None)
    (tmp_path / "text.mp4").write_text("this is no video")
    (tmp_path / "none").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "one.gif")
    for name, part in {"text.mp4": "ffmpeg can read", "none": "without any", "one.gif": "two"}.items():
        assert part in refused(tmp_path, capsys, tmp_path / name, "--prompt", PROMPT)
    message = refused(tmp_path, capsys, "--prompt", PROMPT, "--output", tmp_path / "one.gif")
    assert "--output must be a folder" in message


def test_a_model_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    message = refused(tmp_path, capsys, "--prompt", "a cat", "--model", tmp_path / "nothing")
    assert "StructureContentPipeline" in message


def test_any_prompt_with_another_editor(clip, tmp_path):
    """Its words are not those of the world, and the oracle is not asked."""
    assert edit(tmp_path, "--prompt", "a cat", "--model", tmp_path)["oracle"] == {}


# -- the verdict


def scene(*things: tuple[Thing, Motion]) -> torch.Tensor:
    kinds, motions = zip(*things, strict=True)
    return render([Scene(kinds, motions)])[0]


def path_of(start: tuple[float, float], step: tuple[float, float]) -> Motion:
    return Motion(8.0, np.array(start) + np.arange(8)[:, None] * np.array(step))


def test_the_verdict_on_a_perfect_edit():
    way = path_of((12, 30), (5, 0))
    before = scene((Thing("red", "circle", "right"), way))
    after = scene((Thing("blue", "square", "right"), way))
    found = verdict(before, after, (Thing("blue", "square", None),))
    assert found["before"] == [{"colour": "red", "shape": "circle", "direction": "right"}]
    assert found["after"] == [{"colour": "blue", "shape": "square", "direction": "right"}]
    assert found["colours"] and found["shapes"] and found["direction"]
    assert found["distance"] < 0.5


def test_the_verdict_on_what_went_wrong():
    before = scene((Thing("red", "circle", "right"), path_of((12, 30), (5, 0))))
    after = scene((Thing("blue", "circle", "left"), path_of((47, 42), (-5, 0))))
    found = verdict(before, after, (Thing("blue", "square", None),))
    assert found["colours"] is True and found["shapes"] is False and found["direction"] is False
    apart = np.hypot(np.array([12, 17, 22, 27, 32, 37, 42, 47]) * 2 - 59, 12).mean()
    assert abs(found["distance"] - apart) < 0.5
    nothing = verdict(before, torch.rand(8, 3, 64, 64), (Thing("blue", "square", None),))
    assert nothing["colours"] is False and nothing["after"] == []
    assert nothing["distance"] is None and nothing["direction"] is None


def test_things_that_are_never_seen_together_have_no_distance():
    """Each is there in half of the frames, never both."""
    red = scene((Thing("red", "circle", "right"), path_of((12, 30), (5, 0))))
    blue = scene((Thing("blue", "square", "right"), path_of((12, 30), (5, 0))))
    ground = torch.full_like(red, float(red[0, 0, 0, 0]))
    before, after = red.clone(), blue.clone()
    before[4:], after[:4] = ground[4:], ground[:4]
    with np.errstate(all="raise"):
        found = verdict(before, after, ())
    assert found["before"] and found["after"] and found["distance"] is None
    assert found["direction"] is False


def test_in_python(tmp_path, untrained):
    """A job of its own, and errors that are exceptions."""
    report = run(EditJob(tmp_path / "out", prompt=PROMPT, steps=1), untrained, bars=False)
    assert report["guided_steps"] == 0
    with Image.open(tmp_path / "out" / "edited.gif") as image:
        assert (image.n_frames, image.size) == (8, (128, 128))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    with pytest.raises(ArgumentError, match="--structure"):
        run(EditJob(tmp_path / "out2", prompt=PROMPT, structure=2.5), untrained)
    assert not (tmp_path / "out2").exists()
