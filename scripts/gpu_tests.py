"""Runs the tests of a GPU in several processes for `make gpu`, and counts what they wrote down."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

#: The attention core and what is built on it come first.
FIRST = (
    "tests/ops/test_attention.py",
    "tests/ops/test_gpu.py",
    "tests/ops/test_frame_band_attention.py",
    "tests/ops/test_temporal_attention.py",
    "tests/ops/test_temporal_maps.py",
)

Start = Callable[[list[str]], subprocess.Popen]
Stop = Callable[[subprocess.Popen], None]


def outcomes(folder: Path) -> dict:
    """What the processes wrote into `folder`:
    also which tests began and have no outcome, and how many nobody began.
    """
    lines = []
    for file in sorted(folder.glob("outcomes-*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the last line of a process that was killed while it wrote
                continue
    told = {}
    for line in lines:
        if "test" in line and told.get(line["test"], {}).get("outcome") != "failed":
            told[line["test"]] = line
    collected = {name for line in lines for name in line.get("collected", ())}
    started = {line["started"] for line in lines if "started" in line}
    failed = {name: line["why"] for name, line in told.items() if line["outcome"] == "failed"}
    return {
        "passed": sum(line["outcome"] == "passed" for line in told.values()),
        "failed": failed,
        "skipped": {n: line["why"] for n, line in told.items() if line["outcome"] == "skipped"},
        "unfinished": sorted(started - set(told)),
        "not_run": len(collected - started - set(told)),
    }


def run(folder: Path, arguments: list[str], processes: int, seconds: float, start: Start, stop: Stop) -> dict:
    """Runs the tests and counts them.

    Args:
        folder: new, for claims and outcomes.
        arguments: of pytest.
        processes: how many.
        seconds: after which all are ended; what they have told until then counts.
        start: starts this Python with arguments.
        stop: ends a process and its children.
    """
    folder.mkdir(parents=True)
    command = [
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "share_tests",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        f"--share={folder}",
        f"--share-first={','.join(FIRST)}",
        *arguments,
    ]
    end = time.monotonic() + seconds
    running = [start(command) for _ in range(processes)]
    restarts, late, codes = processes, False, set()
    try:
        while running and not late:
            time.sleep(0.1)
            late = time.monotonic() > end
            for process in [one for one in running if one.poll() is not None]:
                running.remove(process)
                codes.add(process.returncode)
                # 0: passed, 1: some failed or the GPU context was broken, 5: no tests; below 0: killed by a signal
                unfinished = outcomes(folder)["not_run"]
                if process.returncode not in (0, 5) and unfinished and restarts and not late:
                    restarts -= 1
                    running.append(start(command))
    finally:
        for process in running:
            stop(process)
    result = outcomes(folder)
    if not late:
        result["failed"] |= dict.fromkeys(result["unfinished"], "its process ended while it ran")
    failure = None
    if result["failed"]:
        failure = f"{len(result['failed'])} failed: {', '.join(list(result['failed'])[:5])}"
    elif late:
        failure = f"ended after {seconds:.0f} s, its share of the time; {result['not_run']} tests did not run"
    elif not result["passed"]:
        codes = ", ".join(map(str, sorted(codes)))
        failure = f"no test passed (exit codes {codes})"
    elif result["not_run"]:
        failure = f"{result['not_run']} tests did not run"
    return result | {"failure": failure}
