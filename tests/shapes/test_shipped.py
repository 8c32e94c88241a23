"""The pipeline that ships: it loads as stock diffusers, fits, and shows what it is asked for."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.intervals import paired_difference, wilson  # noqa: E402
from cvg_kernels.shapes.evaluation import judge_clips, two_object_prompts  # noqa: E402
from cvg_kernels.shapes.pipeline import WEIGHTS, load_pipeline, sample  # noqa: E402
from cvg_kernels.shapes.world import parse_caption  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def test_weights_fit():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    own = [path for path in files if WEIGHTS / "editor" not in path.parents]
    assert sum(path.stat().st_size for path in own) <= 12e6
    parameters = sum(p.numel() for p in load_pipeline().unet.parameters())
    assert 1e6 <= parameters <= 3e6


@pytest.mark.drawn(4, of="shipped weights")
def test_it_shows_single_objects():
    """Far above chance: a single object of a trained pair is there, in its colour and shape."""
    things = [
        parse_caption(f"a {pair} moving {way}")
        for pair in ("red circle", "white square", "yellow triangle", "purple cross")
        for way in ("left", "down")
    ]
    verdicts = judge_clips(load_pipeline(), things, seed=123).verdicts
    assert sum(verdict.bound for verdict in verdicts) >= 6


@pytest.mark.drawn(8, of="long tests")
def test_a_clip_depends_on_its_prompt_and_seed_alone():
    pipe = load_pipeline()
    prompts = ["a red circle moving left", "a blue square moving up and a white cross moving down"]
    together = sample(pipe, prompts, [5, 6], steps=4)
    alone = sample(pipe, prompts[1:], [6], steps=4)
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.drawn(8, of="long tests")
def test_eval_writes_the_report(tmp_path, capsys):
    path = tmp_path / "report.json"
    code = main(f"shapes eval --guidance none,vico --prompts 2 --steps 2 --json {path}".split())
    assert code == 0 and "vico" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["prompts"] == 2 and set(report["guidance"]) == {"none", "vico"}
    for entry in report["guidance"].values():
        for kind in ("present", "bound", "direction", "all_right"):
            assert set(entry[kind]) == {"rate", "ci95", "n"} and entry[kind]["n"] == 2
        assert entry["seconds_per_clip"] > 0
    assert set(report["guidance"]["vico"]["against_first"]["present"]) == {"difference", "ci95"}


@pytest.mark.drawn(8, of="long tests")
def test_eval_takes_options_and_combinations(tmp_path):
    path, methods = (tmp_path / "report.json", ["none", "gen1:temporal_scale=1", "vico:stop=0.5+gen1"])
    command = f"shapes eval --guidance {','.join(methods)} --prompts 2 --steps 2 --json {path}"
    assert main(command.split()) == 0
    scores = json.loads(path.read_text())["guidance"]
    assert list(scores) == methods
    for kind in ("present", "all_right"):
        assert scores["gen1:temporal_scale=1"][kind] == scores["none"][kind]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            "--guidance none,magic",
            "guidance must be one of none, cvg, vico, vstar, gen1, temporal-band, flowmo, got 'magic'",
        ),
        ("--prompts 1", "--prompts must be at least 2, got 1"),
        ("--model nowhere", "folder must hold a diffusers pipeline"),
        ("--json nowhere/report.json", "--json must lie in a folder that exists"),
        ("--device abacus", "--device abacus cannot be used"),
    ],
)
def test_eval_says_what_is_wrong(arguments, message, capsys):
    assert main(["shapes", "eval", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_prompts_are_drawn_by_seed():
    assert two_object_prompts(20, 3) == two_object_prompts(20, 3)
    assert two_object_prompts(20, 3) != two_object_prompts(20, 4)
    for one, other in two_object_prompts(50, 3):
        assert one.colour != other.colour and one.shape != other.shape


def test_intervals():
    low, high = wilson(45, 50)
    assert abs(low - 0.786) < 1e-3 and abs(high - 0.957) < 1e-3  # Brown, Cai and DasGupta (2001)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)
    found = paired_difference([False, False, True, True], [True, False, True, True])
    assert found["difference"] == 0.25 and found["ci95"][0] < 0.25 < found["ci95"][1]


def test_a_folder_without_pipeline_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="without model_index.json"):
        load_pipeline(tmp_path)
