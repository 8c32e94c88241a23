"""Many prompts: each once, on after failures, again after a kill; by one process and by several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("fcntl")

from cvg_kernels import batch, generate  # noqa: E402
from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.errors import ArgumentError, CvgError  # noqa: E402
from cvg_kernels.processes import Place  # noqa: E402
from cvg_kernels.prompt_file import read_prompts  # noqa: E402
from cvg_kernels.worklist import Worklist  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")


def _manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Six prompts whose clips are files; `broken` says which prompts raise what."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a {colour} thing" for colour in COLOURS))
    items = read_prompts(path, generate.Job("", tmp_path / "out"))
    made, broken = Counter(), {}

    def run(job, load, *, scratch, bars):
        assert not list(scratch.iterdir())
        (scratch / "half a clip").write_text("")
        if job.prompt in broken:
            raise broken[job.prompt]
        made[job.prompt] += 1
        job.output.mkdir(exist_ok=True)
        (job.output / "clip").write_text(job.prompt)
        return {"guided_steps": 0 if job.prompt == "a white thing" else 2}

    monkeypatch.setattr(generate, "run", run)
    return items, made, broken


def test_failures_are_written_down_and_left_alone(listed, tmp_path):
    items, made, broken = listed
    broken["a green thing"] = ArgumentError("no such\n thing")
    broken["a blue thing"] = RuntimeError("out of memory")
    out = tmp_path / "out"
    told = []
    end = batch.run_all(items, out, told=told.append)
    assert (end.done, end.failed, end.total) == (3, 3, 6)
    assert [now.done + now.failed for now in told] == list(range(7))
    lines = {entry["prompt"]: entry for entry in _manifest(out)}
    assert len(lines) == len(_manifest(out)) == 6
    for item in items:
        entry = lines[item.job.prompt]
        assert entry["line"] == item.line and entry["key"] == item.key
        assert entry["settings"] == item.settings and entry["seconds"] >= 0
    green, blue = lines["a green thing"], lines["a blue thing"]
    assert (green["status"], green["error"], green["output"]) == ("failed", "no such thing", None)
    assert "traceback" not in green  # it is the prompt's own
    assert blue["error"] == "RuntimeError: out of memory" and "in run" in blue["traceback"]
    assert lines["a white thing"]["error"] == "no denoising step was guided"
    for entry in lines.values():
        if entry["output"] is not None:
            assert (out / entry["output"] / "clip").read_text() == entry["prompt"]
    assert {path.name for path in out.iterdir()} == {"manifest.jsonl", ".locks"} | {
        entry["output"] for entry in lines.values() if entry["output"]
    }

    broken.clear()
    again = batch.run_all(items, out)  # left alone
    assert (again.done, again.failed) == (3, 3) and sum(made.values()) == 4
    mended = batch.run_all(items, out, attempts=2)
    assert (mended.done, mended.failed) == (5, 1)
    assert made == Counter({f"a {colour} thing": 1 for colour in COLOURS}) + Counter({"a white thing": 1})


def test_attempts_are_made_in_one_run_too(listed, tmp_path):
    items, made, broken = listed
    broken["a red thing"] = OSError("the disk hiccups")
    batch.run_all(items, tmp_path / "out", attempts=3)
    tried = Counter(entry["prompt"] for entry in _manifest(tmp_path / "out"))
    assert tried["a red thing"] == tried["a white thing"] == 3 and tried["a blue thing"] == 1


def test_a_line_that_was_cut_off_is_made_again(listed, tmp_path, caplog):
    """As a full disk or a failing machine leaves it; the line after it is not lost."""
    items, made, _ = listed
    out = tmp_path / "out"
    batch.run_all(items[:3], out)
    whole = (out / "manifest.jsonl").read_bytes()
    (out / "manifest.jsonl").write_bytes(whole[:-20])
    end = batch.run_all(items[:5], out)
    assert (end.done, end.failed) == (5, 0)
    assert made["a blue thing"] == 2 and made["a red thing"] == made["a yellow thing"] == 1
    assert "a line that is none" in caplog.text
    assert batch.run_all(items[:5], out).done == 5 and made.total() == 6


def test_an_interrupt_leaves_no_line_and_the_next_run_goes_on(listed, tmp_path):
    items, made, broken = listed
    broken["a blue thing"] = KeyboardInterrupt()
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        batch.run_all(items, out)
    assert [entry["prompt"] for entry in _manifest(out)] == ["a red thing", "a green thing"]
    broken.clear()
    batch.run_all(items, out)
    assert made.most_common(1)[0][1] == 1 and len(_manifest(out)) == 6


def test_shares_begin_apart_and_models_stay_together(listed, tmp_path):
    items, *_ = listed
    path = tmp_path / "models.jsonl"
    lines = [{"prompt": f"{at}", "model": model} for at, model in enumerate(["b", "a", "b", "a"])]
    path.write_text("\n".join(map(json.dumps, lines)))
    mixed = read_prompts(path, generate.Job("", tmp_path / "out"))
    for rank, wanted in ((0, ["b", "b", "a", "a"]), (1, ["a", "a", "b", "b"])):
        order = batch._order(mixed, Place(rank, 2, rank))
        assert [item.job.model for item in order] == wanted
    begins = [batch._order(items, Place(rank, 3, rank))[0] for rank in range(3)]
    assert begins == [items[0], items[2], items[4]]


def test_a_pipeline_is_loaded_once_for_those_that_share_it(listed, monkeypatch):
    items, *_ = listed
    loaded = []
    monkeypatch.setattr(generate, "load_pipeline", lambda job: loaded.append(job) or len(loaded))
    pipelines = batch._Pipelines()
    assert [pipelines(item.job) for item in items] == [1] * 6
    other = generate.Job("a cat", Path("out"), model="another")
    assert pipelines(other) == 2 and pipelines(other) == 2 and pipelines(items[0].job) == 3


def test_a_device_that_broke_ends_the_process(listed, tmp_path, monkeypatch):
    """What it had left to do is for others; only the prompt that broke it has failed."""
    items, _, broken = listed
    for item in items:
        item.job.device = "cuda:0"
    broken["a green thing"] = RuntimeError("device-side assert")

    def fail(device):
        raise RuntimeError("CUDA error: device-side assert\nmore")

    monkeypatch.setattr(batch.torch.cuda, "synchronize", fail)
    with pytest.raises(CvgError, match="cuda:0 stopped working at line 2: CUDA error"):
        batch.run_all(items, tmp_path / "out")
    assert [entry["status"] for entry in _manifest(tmp_path / "out")] == ["done", "failed"]


def test_a_claim_is_held_against_other_processes(tmp_path):
    """POSIX locks are a process's own, so the other one is really another."""
    work = Worklist(tmp_path)
    ask = (
        "import sys, pathlib; from cvg_kernels.worklist import Worklist\n"
        "work = Worklist(pathlib.Path(sys.argv[1]))\n"
        "for key in sys.argv[2:]:\n"
        "    with work.claim(key) as mine: print(mine)"
    )
    asked = [sys.executable, "-c", ask, str(tmp_path), "0", "fffffffffff0", "fffffffffffe"]
    with work.claim("fffffffffff0") as mine:
        assert mine
        held = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    free = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    assert held.stdout.split() == ["True", "False", "True"]
    assert free.stdout.split() == ["True", "True", "True"]


def _wait(for_what, seconds=240.0):
    end = time.monotonic() + seconds
    while not for_what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.drawn(44, of="two processes")
def test_two_processes_of_which_one_is_killed(tmp_path):
    """While the second is stopped, it lives and keeps its prompt;
    once it is killed, the first takes the prompt over.
    """
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    lines = [{"prompt": f"a {colour} circle moving left", "seed": 3} for colour in COLOURS[:3]]
    path.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "a dog"}])))
    given = ["--prompts", str(path), "--output", str(out), "--steps", "1", "--guidance", "gen1"]
    items = read_prompts(path, generate.Job("", out, guidance="gen1", steps=1))
    held = items[2]  # where the second of two begins

    def start(rank):
        named = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": 2}
        environment = os.environ | {name: str(value) for name, value in named.items()}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "cvg_kernels", "generate", *given]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    second = start(1)
    first = None
    try:
        _wait(lambda: (out / f".{held.key}").is_dir() or second.poll() is not None)
        second.send_signal(signal.SIGSTOP)
        assert not (out / "manifest.jsonl").exists()
        first = start(0)
        _wait(lambda: (out / "manifest.jsonl").exists() and len(_manifest(out)) == 3)
        time.sleep(3 * batch._WAIT)
        assert first.poll() is None and len(_manifest(out)) == 3
        second.kill()
        printed, _ = first.communicate(timeout=240)
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
    assert first.returncode == 1, printed  # for the dog
    assert "3 of 4 done, 1 failed" in printed and "--attempts 2 tries them again" in printed
    entries = _manifest(out)
    assert Counter(entry["key"] for entry in entries) == Counter(item.key for item in items)
    for entry, item in zip(sorted(entries, key=lambda one: one["line"]), items, strict=True):
        assert entry["process"].startswith("0 of 2")
        assert entry["status"] == ("failed" if item.job.prompt == "a dog" else "done")
        if entry["status"] == "done":
            assert (item.job.output / "guided.gif").exists() and entry["guided_steps"] == 1
    assert not list(out.glob(".cvg-*")) and not (out / f".{held.key}").exists()

    before = (out / "manifest.jsonl").read_bytes()
    assert main(["generate", *given]) == 1  # nothing is left to do, and the exit code still tells
    assert (out / "manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "prompt or --prompts FILE must be given, got neither"),
        (["a cat", "--prompts", "FILE"], "prompt or --prompts FILE must be given, got both"),
        (["a cat", "--attempts", "2"], "--attempts must be at least 1 and goes with --prompts"),
        (["--prompts", "FILE", "--attempts", "0"], "--attempts must be at least 1"),
        (["--prompts", "no-such-file"], "--prompts no-such-file cannot be read"),
        (["--prompts", "FILE", "--output", "FILE"], "--output must be a folder, got the file"),
        (["--prompts", "FILE", "--output", "no/where"], "must lie in a folder that exists"),
    ],
)
def test_errors_of_the_command(arguments, message, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle moving left")
    given = [str(path) if one == "FILE" else one for one in arguments]
    given += [] if "--output" in given else ["--output", str(tmp_path / "out")]
    assert main(["generate", *given]) == 2
    assert message in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_folder_without_locks_is_refused(tmp_path, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with pytest.raises(ArgumentError, match="--output must lie on a file system with locks"):
        Worklist(tmp_path / "out")
