"""A list of work that several processes share, on one machine or on many that see the same folder.

What was done is written into `manifest.jsonl`, a line an attempt. What is being done is held by a lock of the
operating system, a byte of `.locks` for each piece of work: it goes when its process ends, however it ends, so that
another process, or the next run, takes the work over. Nothing is decided by time.
"""

from __future__ import annotations

import errno
import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cvg_kernels.errors import ArgumentError
from cvg_kernels.reading import parse_json
from cvg_kernels.writing import append_line

_log = logging.getLogger("cvg_kernels")
_MANIFEST_BYTE = 0
_TAKEN = (errno.EACCES, errno.EAGAIN)


class Worklist:
    """The work of a folder, by keys of hexadecimal digits."""

    def __init__(self, folder: Path) -> None:
        """Opens the list of a folder, which may be new.

        Raises:
            ArgumentError: if the folder cannot be written, or has no locks.
        """
        try:
            import fcntl
        except ImportError:
            raise ArgumentError("--prompts needs a system with file locks (Linux, macOS)") from None
        self._locking = fcntl
        self.manifest = folder / "manifest.jsonl"
        try:
            folder.mkdir(exist_ok=True)
            # Closing any other handle of this file would give up this process's locks: it is opened once.
            self._locks = open(folder / ".locks", "ab")  # noqa: SIM115
        except OSError as error:
            raise ArgumentError(f"--output cannot be written: {error}") from None
        self._read = 0  # bytes of the manifest
        self._entries: dict[str, list[dict[str, Any]]] = defaultdict(list)
        with self._lock(_MANIFEST_BYTE):
            pass  # tells now whether the folder has locks

    def close(self) -> None:
        """Gives up what is claimed."""
        self._locks.close()

    def attempts(self, key: str) -> list[dict[str, Any]]:
        """Returns the lines of the manifest for a key, of all processes and runs, up to this moment."""
        self._refresh()
        return self._entries[key]

    def finished(self, key: str, most: int = 1) -> bool:
        """Whether a piece of work is done, or has failed so often that it is left alone.

        Args:
            key: key of the work.
            most: attempts.
        """
        tried = self.attempts(key)
        return any(one["status"] == "done" for one in tried) or len(tried) >= most

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Holds a piece of work while a block runs; gives `False` if a living process holds it."""
        place = 1 + int(key, 16)
        try:
            self._locking.lockf(self._locks, self._locking.LOCK_EX | self._locking.LOCK_NB, 1, place)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            yield False
            return
        try:
            yield True
        finally:
            self._locking.lockf(self._locks, self._locking.LOCK_UN, 1, place)

    def record(self, entry: dict[str, Any]) -> None:
        """Writes a line of the manifest, with `key` and `status`; it is on the disk when this returns.

        Raises:
            WritingError: if it cannot be written.
        """
        with self._lock(_MANIFEST_BYTE):
            append_line(self.manifest, json.dumps(entry, ensure_ascii=False), sync=True)

    @contextmanager
    def _lock(self, place: int) -> Iterator[None]:
        """Waits for a byte's lock and holds it."""
        try:
            self._locking.lockf(self._locks, self._locking.LOCK_EX, 1, place)
        except OSError as error:
            raise ArgumentError(
                f"--output must lie on a file system with locks, got {self.manifest.parent}: {error}"
            ) from None
        try:
            yield
        finally:
            self._locking.lockf(self._locks, self._locking.LOCK_UN, 1, place)

    def _refresh(self) -> None:
        """Reads what was written since the last time, whole lines only."""
        try:
            with open(self.manifest, "rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return
        whole = new.rfind(b"\n") + 1
        self._read += whole
        for line in new[:whole].splitlines():
            try:
                entry = parse_json(line, self.manifest)
                key, _ = str(entry["key"]), str(entry["status"])
                self._entries[key].append(entry)
            except (ValueError, KeyError, TypeError):
                if line.strip():
                    _log.warning("%s has a line that is none: %r", self.manifest, line[:80])
