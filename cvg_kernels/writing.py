"""Files appear whole under their names, or not at all.

What is being written lies in a hidden folder `.writing-…` beside its place and is moved there by one rename. A process
that is killed meanwhile leaves that folder, which can be deleted, and whatever had the name before. A folder takes the
place of another in one call on Linux; elsewhere in two, between which a killed process leaves the older one in there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cvg_kernels.blocks import block
from cvg_kernels.errors import CvgError

_PREFIX = ".writing-"
_HERE = -100  # AT_FDCWD: paths begin at the working folder
_EXCHANGE = 2  # RENAME_EXCHANGE


class WritingError(CvgError, OSError):
    """A file could not be written; what was there before is as it was."""


@block
def written(path: str | Path) -> Iterator[Path]:
    """Gives a path to write a file to, beside its place and of the same name, and moves it there when the block ends
    well.

    A link is followed. A device or a pipe, such as `/dev/stdout`, is written to as it is.

    Args:
        path: path of the file; its folder exists.

    Raises:
        WritingError: if the file cannot be written, as on a full disk.
    """
    final = Path(os.path.realpath(path))
    if final.exists() and not final.is_file():
        yield final
        return
    with _beside(final, path) as new:
        yield new
        _sync(new)
        if final.exists():
            shutil.copymode(final, new)
        os.replace(new, final)


@block
def written_folder(path: str | Path, *, keep: bool = False) -> Iterator[Path]:
    """Gives a new folder to fill, and puts it in its place when the block ends well; as `written` for one file.

    Args:
        path: path of the folder; the one that it lies in exists.
        keep: whether what an older folder of that name has, and the new one has not, is taken over.

    Raises:
        WritingError: if it cannot be written.
    """
    final = Path(path)
    with _beside(final, path) as new:
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                _sync(file)
        for entry in final.iterdir() if keep and final.exists() else ():
            if not (new / entry.name).exists():
                _take_over(entry, new / entry.name)
        if not final.exists():
            os.rename(new, final)
        elif not _exchanged(new, final):
            old = new.parent / "older folder"
            try:
                os.rename(final, old)
                os.rename(new, final)
            except BaseException:
                if old.exists() and not final.exists():
                    os.rename(old, final)
                raise


def append_line(path: str | Path, line: str, *, sync: bool = False) -> None:
    """Adds a line to a log; one that a stopped process left unfinished is ended first.

    Args:
        path: path of the log; its folder exists.
        line: without its end.
        sync: whether it is on the disk when this returns.

    Raises:
        WritingError: if it cannot be written.
    """
    try:
        with open(path, "a+b") as file:
            whole = True
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                whole = file.read(1) == b"\n"
            file.write((b"" if whole else b"\n") + line.encode() + b"\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise WritingError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: str | Path, text: str) -> None:
    """Writes a file of UTF-8 text; see `written`."""
    with written(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON, indented; see `written`. Infinite numbers and NaN, which JSON has not, become `null`."""
    write_text(path, json.dumps(_finite(content), indent=2) + "\n")


def write_tensors(path: str | Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors in the format of safetensors; see `written`.

    Args:
        path: path of the file.
        tensors: by name, contiguous.
        metadata: further text that the file holds.
    """
    from safetensors.torch import save_file

    with written(path) as new:
        save_file(tensors, new, metadata=metadata)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextmanager
def _beside(final: Path, named: str | Path) -> Iterator[Path]:
    """The place in which something is made; it and everything else there is gone at the end."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=final.parent))
        yield folder / final.name
    except Exception as error:
        # safetensors has an exception of its own for a full disk
        if isinstance(error, WritingError) or not (isinstance(error, OSError) or "os error" in str(error)):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise WritingError(f"{named} cannot be written, what was there is kept: {reason}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _take_over(entry: Path, to: Path) -> None:
    """Gives a file or a folder a second name, or copies it where a file cannot have two."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, to, symlinks=True, copy_function=link)
    else:
        link(str(entry), str(to))


def _exchanged(one: Path, other: Path) -> bool:
    """Lets two folders change their places in one step; says whether that was possible."""
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    return exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _sync(file: Path) -> None:
    """Waits until a file is on the disk: its name must not be there before its contents."""
    with open(file, "rb") as descriptor:
        os.fsync(descriptor.fileno())
