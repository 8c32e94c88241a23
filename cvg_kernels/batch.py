"""Many prompts: each once, by however many processes, again after a kill, and on after a failure."""

from __future__ import annotations

import shutil
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from cvg_kernels import generate
from cvg_kernels.errors import ArgumentError, CvgError
from cvg_kernels.generate import Job
from cvg_kernels.processes import Place
from cvg_kernels.prompt_file import Item
from cvg_kernels.worklist import Worklist

_WAIT = 0.5  # seconds between looks at what other processes hold


@dataclass(frozen=True)
class Progress:
    """How far a list is.

    Attributes:
        done: how many prompts, by all processes and runs.
        failed: how many have failed as often as they may.
        total: how many there are.
        entry: the line of the manifest that this process has just written; `None` at the beginning and while it waits.
    """

    done: int
    failed: int
    total: int
    entry: dict[str, Any] | None = None


def run_all(
    items: Sequence[Item],
    folder: Path,
    *,
    attempts: int = 1,
    place: Place | None = None,
    told: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Does every prompt that is not done, and returns when none is left, nor held by another process.

    A process begins at its own share of the list and then takes what is left; a prompt that a process was making when
    it was killed is taken over by another, or by the next run. `folder/manifest.jsonl` gets a line an attempt: `key`,
    `line`, `prompt`, `settings`, `output` (a folder's name), `status` (`done` or `failed`), `seconds`, `guided_steps`,
    `error` (and `traceback`, if it is no error of the prompt's settings), `process` and `ended`.

    Args:
        items: the prompts.
        folder: for their results and the manifest.
        attempts: how often a prompt may fail, all runs together, before it is left alone.
        place: place of this process among those that share the list; `None` asks the launcher.
        told: called at the beginning, after every prompt, and while waiting.

    Raises:
        ArgumentError: if the folder cannot be used.
        CvgError: if the device stops working.
    """
    place = Place.of_this_process() if place is None else place
    work, pipelines = Worklist(folder), _Pipelines()
    order = _order(items, place)

    def now(entry: dict[str, Any] | None = None) -> Progress:
        tried = [work.attempts(item.key) for item in items]
        done = sum(any(one["status"] == "done" for one in each) for each in tried)
        over = sum(work.finished(item.key, attempts) for item in items)
        return Progress(done, over - done, len(items), entry)

    try:
        told(now())
        while left := [item for item in order if not work.finished(item.key, attempts)]:
            worked = False
            for item in left:
                with work.claim(item.key) as mine:
                    if not mine or work.finished(item.key, attempts):
                        continue
                    worked = True
                    entry = _attempt(item, folder, pipelines, place)
                    work.record(entry)
                told(now(entry))
                _check_device(item.job.device, entry)
            if not worked:
                time.sleep(_WAIT)
                told(now())
        return now()
    finally:
        work.close()


class _Pipelines:
    """The pipeline of the last job, which the next one mostly needs too."""

    def __init__(self) -> None:
        self._of: tuple[str | None, str, str] | None = None
        self._pipe: Any = None

    def __call__(self, job: Job) -> Any:
        wanted = (job.model, job.dtype, job.device)
        if wanted != self._of:
            self._of = self._pipe = None  # first, so that two never fill the memory
            self._pipe = generate.load_pipeline(job)
            self._of = wanted
        return self._pipe


def _order(items: Sequence[Item], place: Place) -> list[Item]:
    """Those of a model together, from this process's share on, round to the beginning."""
    first: dict[tuple[str | None, str], int] = {}
    for item in items:
        first.setdefault((item.job.model, item.job.dtype), len(first))
    grouped = sorted(items, key=lambda item: first[item.job.model, item.job.dtype])
    begin = place.rank * len(grouped) // place.count
    return grouped[begin:] + grouped[:begin]


def _attempt(item: Item, folder: Path, pipelines: _Pipelines, place: Place) -> dict[str, Any]:
    """Does a prompt and returns its line of the manifest."""
    scratch = folder / f".{item.key}"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    began, report, failure = time.perf_counter(), {}, {}
    try:
        scratch.mkdir()
        report = generate.run(item.job, pipelines, scratch=scratch, bars=False)
        if report["guided_steps"] == 0:
            raise ArgumentError("no denoising step was guided")
    except CvgError as error:
        failure = {"error": " ".join(str(error).split())}
    except Exception as error:  # whatever it is, the other prompts are made
        text = " ".join(str(error).split())
        failure = {"error": f"{type(error).__name__}: {text}", "traceback": traceback.format_exc()}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {
        "key": item.key,
        "line": item.line,
        "prompt": item.job.prompt,
        "settings": item.settings,
        "output": item.job.output.name if item.job.output.exists() else None,
        "status": "failed" if failure else "done",
        "seconds": round(time.perf_counter() - began, 3),
        "guided_steps": report.get("guided_steps"),
        "error": None,
        **failure,
        "process": f"{place.rank} of {place.count}, {socket.gethostname()}",
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _check_device(device: str, entry: dict[str, Any]) -> None:
    """Stops this process if a prompt has left the GPU unusable: every other one would be written down as failed.

    Raises:
        CvgError: if it has.
    """
    if entry["status"] == "done" or not device.startswith("cuda"):
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what ran out of memory leaves room to the next
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CvgError(f"{device} stopped working at line {entry['line']}: {reason}") from None
