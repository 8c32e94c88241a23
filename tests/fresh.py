"""Interpreters that have imported torch and nothing else:
forks of one that waits, since that import takes a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Reads a request a line, runs its code in a fork, and answers with how it ended. No thread runs where the forks are
#: made.
_WAITING = """
import json, os, sys, traceback
import torch

def become(asked):
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(os.devnull)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    code = 0
    try:
        exec(compile(asked["code"], "<fresh>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        become(json.loads(line))
    status = os.waitpid(child, 0)[1]
    os.write(1, f"{os.waitstatus_to_exitcode(status)}\\n".encode())
"""


class Fresh:
    """Runs code as a new interpreter with torch would."""

    def __init__(self) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.waiting = subprocess.Popen(
            [sys.executable, "-c", _WAITING],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, code: str, folder: Path, **changes: str | None) -> subprocess.CompletedProcess:
        """Runs code in a folder, and returns how it ended and what it wrote.

        Args:
            code: of the program.
            folder: where it runs; its output is kept there.
            **changes: of the environment; `None` takes a variable out.
        """
        environment = {k: v for k, v in (os.environ | changes).items() if v is not None}
        out, err = folder / "fresh-stdout", folder / "fresh-stderr"
        asked = {
            "code": code,
            "folder": str(folder),
            "environment": environment,
            "stdout": str(out),
            "stderr": str(err),
        }
        self.waiting.stdin.write(json.dumps(asked) + "\n")
        self.waiting.stdin.flush()
        ended = int(self.waiting.stdout.readline())
        return subprocess.CompletedProcess(code, ended, out.read_text(), err.read_text())

    def right(self, code: str, folder: Path, **changes: str | None) -> str:
        """Runs code that must end well, and returns what it printed."""
        done = self(code, folder, **changes)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def fresh():
    """See `Fresh`."""
    made = Fresh()
    yield made
    made.waiting.stdin.close()
    made.waiting.wait()
