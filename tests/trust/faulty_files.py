"""File systems that fail: at a chosen one of the calls that write below a folder, or where a file grows too large."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What Python tells before it does it (`sys.addaudithook`): event → which of its arguments is what will be written.
_WRITES = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "open": 0}
_FULL = OSError(errno.ENOSPC, "No space left on device")
_active: list[Faults] = []


class Faults:
    """Counts the calls that write below a folder within a block; the one with number `at` fails instead.

    Attributes:
        count: calls so far.
        failed: the one that failed, in words.
    """

    def __init__(self, folder: Path, at: int | None = None, fault: str = "full") -> None:
        """Prepares a block.

        Args:
            folder: below which calls count.
            at: number of the call that fails, from 1.
            fault: "full": as on a full disk; "interrupted": by the keyboard; "killed": the process is, by the system.
        """
        self.folder, self.at, self.fault = os.path.realpath(folder), at, fault
        self.count, self.failed = 0, None

    def __enter__(self) -> Faults:
        if not _active:
            _watch()
        _active.append(self)
        return self

    def __exit__(self, *_) -> None:
        _active.remove(self)

    def note(self, event: str, arguments: tuple) -> None:
        """Counts a call, or lets it fail."""
        place = arguments[_WRITES[event]]
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if not isinstance(place, (str, os.PathLike)) or not os.path.abspath(place).startswith(self.folder):
            return
        self.count += 1
        if self.count != self.at or self.failed:
            return
        self.failed = f"{event} of {place}"
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt if self.fault == "interrupted" else _FULL


def _watch() -> None:
    """From now on events are looked at; a hook cannot be taken away."""
    global _watch

    def hook(event: str, arguments: tuple) -> None:
        if _active and event in _WRITES:
            for one in tuple(_active):
                one.note(event, arguments)

    sys.addaudithook(hook)
    _watch = lambda: None  # noqa: E731


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """No file can become larger than so many bytes, as on a disk that is full in the middle of one."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder that have a final name, all levels."""
    found = {}
    for path in folder.rglob("*") if folder.exists() else ():
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            found[name] = path.read_bytes()
    return found


def left_over(folder: Path) -> list[str]:
    """Hidden folders and files in which something was made."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".locks")
