"""What others wrote, read as data: of bounded size, checked before it is used, and never unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from cvg_kernels.errors import ArgumentError

#: The largest JSON file, in bytes, unless a reader says otherwise.
MOST_BYTES = 64 * 2**20
_DIGITS = 20  # of 2⁶⁴


class Header(NamedTuple):
    """What the head of a safetensors file says of a tensor: its dtype as written there ("F32"), and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_bytes(path: str | Path, *, most: int = MOST_BYTES, pipes: bool = False) -> bytes:
    """Reads a file that is not too large.

    Args:
        path: path of the file; links are followed.
        most: bytes.
        pipes: whether it may be a pipe or a terminal, which would otherwise be waited for in vain.

    Raises:
        OSError: if it cannot be read.
        ArgumentError: if it is too large, or no file.
    """
    if not pipes and not stat.S_ISREG(os.stat(path).st_mode):
        raise ArgumentError(f"{path} must be a file, got a folder, a pipe or a device")
    with open(path, "rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise ArgumentError(f"{path} must have at most {most} bytes, got more")
    return found


def text_of(data: bytes, name: str | Path) -> str:
    """Decodes UTF-8, with or without a byte-order mark.

    Args:
        data: that was read.
        name: name of the file, for the error.

    Raises:
        ArgumentError: for any other encoding.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{name} must be UTF-8, got byte 0x{data[error.start]:02x} at {error.start}") from None


def parse_json(data: bytes | str, name: str | Path) -> Any:
    """Parses JSON that others wrote.

    Args:
        data: UTF-8, or text.
        name: where it is from, for the error.

    Raises:
        ArgumentError: for what is no JSON, names given twice in an object, numbers that are not finite or do not fit
            64 bits, half a surrogate pair, or nesting that is too deep.
    """
    text = text_of(data, name) if isinstance(data, bytes) else data
    try:
        found = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_float, parse_int=_integer
        )
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"{name} must be valid text, got half of a surrogate pair") from None
    except RecursionError:
        raise ArgumentError(f"{name} must be JSON, got one that is nested too deeply") from None
    except ValueError as error:
        raise ArgumentError(f"{name} must be JSON: {error}") from None
    return found


def read_json(path: str | Path, *, most: int = MOST_BYTES) -> Any:
    """Reads a JSON file; see `read_bytes` and `parse_json`.

    Raises:
        ArgumentError: if it cannot be read, or holds something else.
    """
    try:
        data = read_bytes(path, most=most)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from None
    return parse_json(data, path)


def read_object(path: str | Path, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        ArgumentError: if it cannot be read, or holds something else.
    """
    found = read_json(path, most=most)
    if not isinstance(found, dict):
        raise ArgumentError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def tensor_headers(path: str | Path) -> dict[str, Header]:
    """Reads what a safetensors file holds, without its tensors.

    Raises:
        ArgumentError: if it is none, or its head and its size do not agree.
    """
    with _open(path) as file:
        return {name: _header(file, name) for name in file.keys()}  # noqa: SIM118


def read_tensors(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None, *, finite: bool = False
) -> dict[str, Any]:
    """Reads the tensors of a safetensors file.

    Args:
        path: path of the file.
        shapes: by name; all of them must be there and no others, which is checked before any is read. `None`:
            anything.
        finite: whether infinite numbers and NaN are refused.

    Raises:
        ArgumentError: if the file holds something else.
    """
    if shapes is not None:
        check_shapes(path, shapes)
    with _open(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items() if finite else ():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ArgumentError(f"{path} must hold finite numbers, got infinity or NaN in {name!r}")
    return tensors


def check_shapes(path: str | Path, shapes: Mapping[str, tuple[int, ...]], *, part: str = "") -> None:
    """Checks which tensors a safetensors file holds, without reading them.

    Args:
        path: path of the file.
        shapes: by name; all of them must be there and no others.
        part: only tensors whose names begin with this are looked at.

    Raises:
        ArgumentError: if it holds others.
    """
    found = {name: head.shape for name, head in tensor_headers(path).items() if name.startswith(part)}
    for what, names in (
        ("lacks", shapes.keys() - found.keys()),
        ("has, beside what it should,", found.keys() - shapes.keys()),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ArgumentError(f"{path} {what} {', '.join(sorted(names)[:3])}{more}")
    for name in sorted(shapes):
        if found[name] != tuple(shapes[name]):
            raise ArgumentError(f"{path} must have {name!r} of shape {list(shapes[name])}, got {list(found[name])}")


def metadata_of(path: str | Path) -> dict[str, str]:
    """Reads the text that a safetensors file holds beside its tensors.

    Raises:
        ArgumentError: if it is no such file.
    """
    with _open(path) as file:
        return file.metadata() or {}


def digest(path: str | Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits.

    Raises:
        ArgumentError: if it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                found.update(part)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from None
    return found.hexdigest()


@contextmanager
def _open(path: str | Path) -> Iterator[Any]:
    """A safetensors file that is one."""
    from safetensors import SafetensorError, safe_open

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ArgumentError(f"{path} must be a file, got a folder, a pipe or a device")
        with safe_open(path, "pt") as file:
            yield file
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ArgumentError(f"{path} must be a safetensors file: {str(error)[:200]}") from None


def _header(file: Any, name: str) -> Header:
    part = file.get_slice(name)
    return Header(str(part.get_dtype()), tuple(part.get_shape()))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:60]!r} is given twice")
        found[name] = value
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} does not fit a float")
    return value


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _DIGITS or abs(int(text)) >= 2**64:
        raise ValueError(f"{text[:20]}… does not fit 64 bits")
    return int(text)
