"""A full disk, a keyboard interrupt or a kill while a command writes.

Whatever ends it, what carries a final name is whole: as a run that went well writes it, or as it was before. The
pipeline is as if never touched, and the next run gives what it would have given.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("resource")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels import edit, generate  # noqa: E402
from cvg_kernels.cli import main, scenes  # noqa: E402
from cvg_kernels.composition import CompositionClassifier  # noqa: E402
from cvg_kernels.errors import CvgError  # noqa: E402
from cvg_kernels.shapes.pipeline import load_pipeline  # noqa: E402
from cvg_kernels.training.checkpoint import Checkpoint  # noqa: E402
from cvg_kernels.writing import WritingError, write_json, written_folder  # noqa: E402
from tests.composition.test_training import RECIPE, SMALL, accelerator, train_classifier, write_features  # noqa: E402
from tests.editing.tiny import tiny_editor  # noqa: E402
from tests.trust.faulty_files import Faults, contents, left_over, small_files  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "a red circle moving left"
FAULTS = ("full", "interrupted")


def without_times(files: dict[str, bytes]) -> dict[str, bytes | dict]:
    """Files with reports as far as they are the same in two runs."""
    found: dict[str, bytes | dict] = dict(files)
    if "report.json" in files:
        report = json.loads(files["report.json"])
        found["report.json"] = {n: v for n, v in report.items() if n not in ("seconds", "peak_memory_mib", "job")}
    return found


class Generated:
    """`cvg-kernels generate`, with one pipeline for all runs."""

    def __init__(self) -> None:
        self.pipe = load_pipeline()

    def run(self, output: Path) -> None:
        job = generate.Job(PROMPT, output, guidance="vico", steps=1, frames=4)
        assert generate.run(job, lambda _: self.pipe, bars=False)["guided_steps"] == 1

    def alone(self) -> torch.Tensor:
        """What the pipeline makes without a method."""
        generator = torch.Generator().manual_seed(3)
        options = {"num_frames": 2, "num_inference_steps": 1, "output_type": "latent", "generator": generator}
        return self.pipe(PROMPT, height=64, width=64, **options).frames


class Edited:
    """`cvg-kernels edit`, likewise; the editor is an untrained one."""

    def __init__(self) -> None:
        self.pipe = tiny_editor()

    def run(self, output: Path) -> None:
        job = edit.EditJob(output=output, prompt="a blue square", steps=1)
        edit.run(job, self.pipe, bars=False)

    def alone(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        clip = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(4))
        options = {"num_inference_steps": 1, "output_type": "pt", "generator": generator}
        return self.pipe(video=clip, prompt="a red circle", **options).frames


@pytest.fixture(scope="module", params=[Generated, Edited])
def command(request, tmp_path_factory):
    """A command, what it writes, and how many calls that takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made, folder = request.param(), tmp_path_factory.mktemp("right")
    made.before = made.alone()
    with Faults(folder) as calls:
        made.run(folder / "out")
    assert calls.count > 10 and not left_over(folder)
    made.calls, made.right = calls.count, without_times(contents(folder / "out"))
    torch.set_num_threads(before)
    return made


def is_whole(command, output: Path, older: dict[str, bytes]) -> bool:
    """Whether each file of a folder is as a run writes it, or as it was."""
    found = without_times(contents(output))
    return all(one == command.right.get(name) or one == older.get(name) for name, one in found.items())


@pytest.mark.drawn(4, of="long tests")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("there", [False, True])
def test_a_command_that_fails_while_it_writes(command, fault, there, tmp_path):
    """At a call that nobody chose, into a new folder or one with an older result and something of the user's."""
    output, older = tmp_path / "out", {}
    if there:
        output.mkdir()
        older = {"guided.gif": b"older", "edited.gif": b"older", "report.json": b"{}", "mine.txt": b"mine"}
        for name, data in older.items():
            (output / name).write_bytes(data)
        older["report.json"] = {}
    at = random.randint(1, command.calls)
    with Faults(tmp_path, at, fault) as planted, pytest.raises((CvgError, OSError, KeyboardInterrupt)) as caught:
        command.run(output)
    assert planted.failed and isinstance(caught.value, KeyboardInterrupt) == (fault == "interrupted")
    assert is_whole(command, output, older), planted.failed
    assert not left_over(tmp_path), planted.failed
    assert not there or (output / "mine.txt").read_bytes() == b"mine"
    assert torch.equal(command.alone(), command.before)
    command.run(output)
    found = without_times(contents(output))
    assert {name: one for name, one in found.items() if name in command.right} == command.right


@pytest.mark.drawn(4, of="long tests")
def test_a_disk_that_is_full_in_the_middle_of_a_file(command, tmp_path):
    """Encoders that are programs of their own notice it too."""
    sizes = sorted(len(one) for one in command.right.values() if isinstance(one, bytes))
    with small_files(random.randint(1, sizes[-1] - 1)), pytest.raises(CvgError) as caught:
        command.run(tmp_path / "out")
    assert "cannot be written" in str(caught.value)
    assert is_whole(command, tmp_path / "out", {}) and not left_over(tmp_path)
    assert torch.equal(command.alone(), command.before)
    command.run(tmp_path / "out")
    assert without_times(contents(tmp_path / "out")) == command.right


# --- the page of maps, reports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_the_page_of_captured_maps(command, fault, tmp_path):
    if isinstance(command, Edited):
        pytest.skip("one pipeline is enough")
    with cvg.capture(command.pipe, ["circle"]) as captured:
        frames = command.alone()
    shown, page = torch.rand(len(frames[0]), 3, 16, 16), tmp_path / "maps.html"
    for older in (None, "older"):
        if older:
            page.write_text(older)
        with Faults(tmp_path) as calls:
            captured.write_viewer(tmp_path / "other.html", shown)
        for at in range(1, calls.count + 1):
            with Faults(tmp_path, at, fault), pytest.raises((WritingError, KeyboardInterrupt)):
                captured.write_viewer(page, shown)
            assert (page.read_text() if page.exists() else None) == older
            assert not left_over(tmp_path)
    captured.write_viewer(page, shown)
    assert page.read_bytes() == (tmp_path / "other.html").read_bytes()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("action", ["eval", "gate"])
def test_a_report_of_measurements(action, fault, tmp_path, monkeypatch, capsys):
    """What was measured for hours is printed before its file is written; the older file stays."""
    monkeypatch.setattr(scenes, f"_{action}", lambda options: print("measured") or {"a": [0.5] * 999})
    path = tmp_path / "report.json"
    path.write_text("older")
    with Faults(tmp_path) as calls:
        write_json(tmp_path / "other.json", {})
    for at in range(1, calls.count + 1):
        with Faults(tmp_path, at, fault):
            if fault == "full":
                assert main(["scenes", action, "--json", str(path)]) == 2
                said = capsys.readouterr()
                assert said.out == "measured\n" and said.err.count("\n") == 1
                assert f"{path} cannot be written, what was there is kept: No space left" in said.err
            else:
                assert main(["scenes", action, "--json", str(path)]) == 130
        assert path.read_text() == "older" and not left_over(tmp_path)
    assert main(["scenes", action, "--json", str(path)]) == 0
    assert len(json.loads(path.read_text())["a"]) == 999


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("exchange", [False, True])
def test_a_folder_at_every_call(exchange, keep, fault, tmp_path, monkeypatch):
    """With the system's exchange of two folders, and with two renames."""
    if not exchange:
        monkeypatch.setattr("cvg_kernels.writing._exchanged", lambda *_: False)
    folder = tmp_path / "model"
    older = {"a": b"older", "mine": b"mine", "sub/b": b"mine too"}
    newer = {"a": b"newer", "c": b"3"} | ({name: older[name] for name in ("mine", "sub/b")} if keep else {})

    def fill() -> None:
        with written_folder(folder, keep=keep) as new:
            (new / "a").write_text("newer")
            (new / "c").write_text("3")

    def begin() -> None:
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        for name in set(contents(folder)) - set(older):
            (folder / name).unlink()
        for name, data in older.items():
            (folder / name).write_bytes(data)

    begin()
    with Faults(tmp_path) as calls:
        fill()
    assert contents(folder) == newer
    for at in range(1, calls.count + 1):
        begin()
        with Faults(tmp_path, at, fault) as planted:
            try:
                fill()
            except (WritingError, KeyboardInterrupt):
                assert contents(folder) == older, planted.failed
            else:  # a second name that could not be given is a copy
                assert planted.failed.startswith("os.link") and contents(folder) == newer
        assert not left_over(tmp_path)


# --- trainings, lists of prompts: killed by the system ---------------------------------------------------------------

TRAIN = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from cvg_kernels.training.checkpoint import Checkpoint
from tests.composition.test_training import RECIPE, SMALL, accelerator, train_classifier
from tests.trust.faulty_files import Faults
Checkpoint.save_sometimes = Checkpoint.save
with Faults(Path("run"), {at}, "killed"):
    train_classifier(Path("run"), RECIPE, accelerator(), **SMALL)
"""


@pytest.mark.drawn(4, of="long tests")
def test_a_training_that_is_killed_while_it_writes_goes_on_to_the_same(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "save_sometimes", Checkpoint.save)
    for name in ("whole", "run"):
        write_features(tmp_path / name)
    with Faults(tmp_path / "whole") as calls:
        whole = train_classifier(tmp_path / "whole", RECIPE, accelerator(), **SMALL)
    at = random.randint(1, calls.count)
    for _ in range(2):  # the run that goes on is killed as well
        done = fresh(TRAIN.format(at=at), tmp_path)
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
    resumed = train_classifier(tmp_path / "run", RECIPE, accelerator(), **SMALL)
    one, other = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    loaded = CompositionClassifier.load(tmp_path / "run" / "classifier").state_dict()
    assert all(torch.equal(one[name], loaded[name]) for name in loaded)


GENERATE = """
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.trust.faulty_files import Faults
from cvg_kernels.cli import main
arguments = ["generate", "--prompts", "prompts.jsonl", "--guidance", "vico", "--steps", "1", "--frames", "4"]
with Faults(Path("out"), {at}, "killed") as calls:
    assert main([*arguments, "--output", "out"]) == 0
print(calls.count)
"""


@pytest.mark.drawn(4, of="long tests")
def test_a_list_of_prompts_that_is_killed_while_it_writes(fresh, tmp_path):
    found = []
    calls = 0
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT, "seed": 5}) + "\n")
        if name == "killed":
            done = fresh(GENERATE.format(at=random.randint(1, calls)), folder)
            assert done.returncode == -signal.SIGKILL, done.stderr
            assert not [one for one in (folder / "out").glob("*/report.json") if not json.loads(one.read_text())]
        calls = int(fresh.right(GENERATE.format(at=0), folder).splitlines()[-1])
        (made,) = (one for one in (folder / "out").iterdir() if one.is_dir())
        found.append(without_times(contents(made)))
    assert found[0] == found[1] and found[0]["report.json"]["guided_steps"] == 1
