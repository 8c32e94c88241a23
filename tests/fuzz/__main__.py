"""Generated calls of every public operation: `python -m tests.fuzz [options]`, or `make fuzz FUZZ_ARGS='…'`.

Calls are made in processes of their own, some thousand in each, so that one that dies or hangs names its call and the
rest goes on. Every failure is printed as a program that repeats it, made as small as it goes. The exit status says
whether there was one.

A long run is kept in a file with `--keep`: the same command with the same file makes the calls that failed once more,
then those that are left. `--write` adds a run without failures to those in docs/accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import worker
from tests.fuzz.cases import Case, draw
from tests.fuzz.numbers import Numbers, add
from tests.fuzz.shrink import shrunk

_BATCH = 5000  # calls of a process: few enough that its memory cannot creep far
_SHOWN = 20  # failures that are made small and printed


class Run:
    """Calls of one backend.

    Attributes:
        numbers: the largest errors of all of them.
        failures: number of a call → what was wrong.
        first: number of the first call.
        made: calls so far.
    """

    def __init__(self, seed: int, backend: str, first: int = 0) -> None:
        self.seed, self.backend, self.first = seed, backend, first
        self.numbers = Numbers()
        self.failures: dict[int, str] = {}
        self.made = 0

    def make(self, calls: int, seconds: float, keep: Callable[[], object] = lambda: None) -> None:
        """Makes calls until as many are made or the time is over; calls that failed before, once more."""
        end = time.monotonic() + seconds
        for number in sorted(self.failures):
            del self.failures[number]
            self._batch(number, 1, worker.LIMIT)
        while self.made < calls and time.monotonic() < end:
            wanted = min(_BATCH, calls - self.made)
            self.made += self._batch(self.first + self.made, wanted, end - time.monotonic())
            keep()
            print(f"{self.backend}: {self.made} calls, {len(self.failures)} failed", flush=True)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "seed": self.seed,
            "backend": self.backend,
            "first": self.first,
            "made": self.made,
            "failures": [*self.failures.items()],
            "numbers": self.numbers.lines(),
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Run:
        """The run that a state is of."""
        run = cls(state["seed"], state["backend"], state["first"])
        run.made, run.failures = state["made"], {int(number): says for number, says in state["failures"]}
        run.numbers.add(state["numbers"])
        return run

    def _batch(self, first: int, calls: int, seconds: float) -> int:
        """Makes calls in a process; returns how many it made, the one that it died of included."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            given = [self.seed, self.backend, first, calls, seconds, folder]
            ended = subprocess.run(
                [sys.executable, "-m", "tests.fuzz.worker", *map(str, given)],
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            found = folder / "found.jsonl"
            lines = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
            for line in lines:
                if line["kind"] == "failure":
                    self.failures[line["number"]] = line["says"]
            if lines and lines[-1]["kind"] == "end":
                self.numbers.add(lines[-1]["numbers"])
                return lines[-1]["made"]
            at = folder / "at"
            said = at.read_text().strip() if at.exists() else ""
            if not said:
                raise SystemExit(f"the process that makes calls did not start:\n{ended.stderr}")
            last = int(said)
            tail = "\n".join(ended.stderr.splitlines()[-120:])
            self.failures[last] = f"the process ended with {ended.returncode}:\n{tail}"
            return last - first + 1


def dies(case: Case) -> bool:
    """Whether a call fails in a process of its own, in whatever way."""
    code = f"from tests.fuzz.worker import prepare\nprepare()\n{case.code()}"
    try:
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=2 * worker.LIMIT)
    except subprocess.TimeoutExpired:
        return True
    return ended.returncode != 0


def report(run: Run) -> None:
    """Prints failures, each as small a program as was found."""
    from tests.fuzz.operations import OPERATIONS
    from tests.fuzz.oracle import Failure, examine

    def fails(case: Case) -> bool:
        try:
            examine(case)
        except Failure:
            return True
        return False

    for number, says in sorted(run.failures.items())[:_SHOWN]:
        case = draw(run.seed, number, run.backend, OPERATIONS)
        died = says.startswith("the process ended")
        small = shrunk(case, OPERATIONS, dies if died else fails, tries=40 if died else 400)
        print(f"\ncall {number} of seed {run.seed}, backend {run.backend}: {says}\n\n{small.code()}")
    if len(run.failures) > _SHOWN:
        print(f"\nand {len(run.failures) - _SHOWN} more: calls {sorted(run.failures)[_SHOWN:]}")


def main() -> int:
    """Reads the command line and makes the calls."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000, help="of each backend in all (default: %(default)s)")
    parser.add_argument("--backends", default="native,reference", help="comma-separated (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run with the seed it printed")
    parser.add_argument("--minutes", type=float, default=600, help="of each backend, at most")
    parser.add_argument("--keep", type=Path, help="a JSON file in which the run is kept; goes on with the one there")
    parser.add_argument("--write", action="store_true", help="add the run to docs/accuracy.json and docs/accuracy.md")
    parser.add_argument("--anew", action="store_true", help="with --write: in the place of these backends' runs there")
    given = parser.parse_args()
    runs = _kept(given) or _begun(given)
    worker.prepare()
    for run in runs:
        run.make(given.calls, 60 * given.minutes, lambda: _keep(given.keep, runs))
        _keep(given.keep, runs)
        report(run)
    failed = sum(len(run.failures) for run in runs)
    for run in runs:
        print(f"{run.backend}: {run.made} calls, {len(run.failures)} failed")
    if given.write and not failed:
        add([run.state() for run in runs], anew=given.anew)
    return int(failed > 0)


def _begun(given: argparse.Namespace) -> list[Run]:
    seed = secrets.randbelow(2**31) if given.seed is None else given.seed
    print(f"seed {seed} (repeat with --seed {seed})", flush=True)
    return [Run(seed, backend, given.first) for backend in given.backends.split(",")]


def _kept(given: argparse.Namespace) -> list[Run]:
    if given.keep is None or not given.keep.exists():
        return []
    return [Run.of(state) for state in json.loads(given.keep.read_text())]


def _keep(file: Path | None, runs: list[Run]) -> None:
    """Replaces the file at once, so that what is killed meanwhile leaves the one before."""
    if file is not None:
        new = file.with_name(f"{file.name}.new")
        new.write_text(json.dumps([run.state() for run in runs]))
        new.replace(file)


if __name__ == "__main__":
    sys.exit(main())
