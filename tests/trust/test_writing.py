"""What carries a final name is whole, whatever ends the writer; and what was there before stays."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cvg_kernels.errors import CvgError
from cvg_kernels.reading import read_tensors
from cvg_kernels.writing import (
    WritingError,
    append_line,
    write_json,
    write_tensors,
    write_text,
    written,
    written_folder,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("before", [None, "older"])
@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_writer_that_fails_leaves_what_was_there(before, error, tmp_path):
    path = tmp_path / "report.json"
    if before is not None:
        path.write_text(before)
    with pytest.raises((type(error), CvgError)) as caught, written(path) as new:
        new.write_text("half of")
        raise error
    if isinstance(error, OSError):
        assert isinstance(caught.value, WritingError)
        assert str(caught.value).startswith(f"{path} cannot be written, what was there is kept: No")
    assert [one.name for one in tmp_path.iterdir()] == ([] if before is None else [path.name])
    assert before is None or path.read_text() == before


@pytest.mark.parametrize("keep", [False, True])
def test_a_folder_appears_whole(keep, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(RuntimeError), written_folder(folder) as new:
        (new / "a").write_text("1")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with written_folder(folder) as new:
        (new / "a").write_text("1")
        (new / "mine").write_text("2")
        assert not folder.exists()
    with pytest.raises(RuntimeError), written_folder(folder, keep=keep) as new:
        (new / "a").write_text("3")
        raise RuntimeError
    assert (folder / "a").read_text() == "1" and (folder / "mine").exists()
    with written_folder(folder, keep=keep) as new:
        (new / "a").write_text("3")
    assert (folder / "a").read_text() == "3" and (folder / "mine").exists() == keep
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("keep", [False, True])
def test_a_folder_that_cannot_take_its_place_leaves_the_older_one(keep, tmp_path, monkeypatch):
    """Where two folders cannot change their places in one step."""
    monkeypatch.setattr("cvg_kernels.writing._exchanged", lambda *_: False)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("older")
    (folder / "mine").write_text("mine")
    rename = os.rename

    def full(source, target):
        if Path(target) == folder and Path(source).name == "model":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(WritingError, match="model cannot be written"), written_folder(folder, keep=keep) as new:
        (new / "a").write_text("newer")
    assert (folder / "a").read_text() == "older" and (folder / "mine").exists()
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.drawn(8, of="long tests")
def test_the_disk_is_full(tmp_path):
    """A file system of 64 KiB would need rights; the limit on a file's size is the nearest that every user may set."""
    code = (
        "import resource, signal, torch, sys\n"
        "from cvg_kernels.writing import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "for name, write in (('a.json', lambda p: write_json(p, [0] * 9999)),\n"
        "                    ('a.safetensors', lambda p: write_tensors(p, {'a': torch.ones(9999)}))):\n"
        "    try:\n"
        "        write(name)\n"
        "    except WritingError as error:\n"
        "        print(error)\n"
    )
    for name in ("a.json", "a.safetensors"):
        (tmp_path / name).write_text("older")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("cannot be written, what was there is kept" in o for o in lines)
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == dict.fromkeys(
        ("a.json", "a.safetensors"), "older"
    )


@pytest.mark.drawn(8, of="long tests")
def test_a_killed_process_leaves_no_half_file(tmp_path):
    """Killed by the system while it writes one file after the other, at moments nobody chose."""
    path = tmp_path / "state.safetensors"
    code = (
        "import torch, itertools\nfrom cvg_kernels.writing import write_tensors\n"
        "for number in itertools.count(1):\n"
        "    write_tensors('state.safetensors', {'a': torch.full((200_000,), float(number))})\n"
    )
    seen = set()
    for _ in range(3):
        started = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        before = path.stat().st_mtime_ns if path.exists() else None
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert started.poll() is None
            time.sleep(0.002)
        time.sleep(torch.rand(()).item() * 0.05)
        started.send_signal(signal.SIGKILL)
        started.wait()
        value = read_tensors(path, {"a": (200_000,)})["a"]
        assert bool((value == value[0]).all()) and value[0] >= 1
        seen.add(float(value[0]))
        names = {one.name for one in tmp_path.iterdir()}
        assert all(name == path.name or name.startswith(".writing-") for name in names)
    assert seen


def test_names_modes_links_and_devices(tmp_path):
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    write_json(path, {"a": (1, float("nan")), "b": [float("inf"), 2.5]})
    assert json.loads(path.read_text()) == {"a": [1, None], "b": [None, 2.5]}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    path.chmod(0o640)
    link.symlink_to(path)
    write_text(link, "other")
    assert link.is_symlink() and path.read_text() == "other"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    write_json("/dev/null", {})
    assert not Path("/dev/null").is_file()
    with pytest.raises(WritingError, match="no/such/a.json cannot be written"):
        write_text(tmp_path / "no/such/a.json", "")


def test_what_is_being_written_is_no_shard(tmp_path):
    """Readers take every file of a suffix."""
    with written(tmp_path / "000000.safetensors") as new:
        new.write_text("half")
        assert new.name == "000000.safetensors"
        assert not list(tmp_path.glob("*.safetensors"))


def test_a_log_goes_on_after_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, "1")
    with path.open("a") as file:
        file.write('{"half')
    append_line(path, "2")
    assert path.read_text() == '1\n{"half\n2\n'


def test_tensors_that_cannot_be_written_leave_the_older_ones(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(2)})
    with pytest.raises(ValueError):
        write_tensors(path, {"a": torch.ones(2, 3).mT})
    assert torch.equal(read_tensors(path)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]
