"""Files that nobody should trust, and how they are refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from cvg_kernels.errors import ArgumentError


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.mark,)


def pickled(mark: Path) -> bytes:
    """A pickle that runs code; that it does is seen in `mark`."""
    return pickle.dumps({"weight": Bomb(mark)})


def saved_by_torch(path: Path, mark: Path) -> None:
    """A file of `torch.save` that runs code."""
    torch.save({"weight": Bomb(mark), "step": 3}, path)


def safetensors(head: Any, data: bytes = b"", size: int | None = None) -> bytes:
    """A file of safetensors with any head, and any size said of it."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    """What a head says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


#: Text that is no JSON object → what the error says of it.
BAD_JSON = {
    "cut off": (b'{"format": 1, ', "Expecting"),
    "empty": (b"", "Expecting value"),
    "zeros": (b"\0" * 64, "Expecting value"),
    "list": (b"[1]", "."),
    "number": (b"7", "."),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "deep object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "twice": (b'{"format": 1, "format": 1}', "'format' is given twice"),
    "NaN": (b'{"format": NaN}', "NaN is no number"),
    "infinite": (b'{"format": -Infinity}', "Infinity is no number"),
    "overflow": (b'{"format": 1e999}', "does not fit a float"),
    "huge": (b'{"format": ' + b"9" * 5000 + b"}", "does not fit 64 bits"),
    "larger than 64 bits": (b'{"format": 18446744073709551616}', "does not fit 64 bits"),
    "latin": ('{"format": "é"}'.encode("latin-1"), "UTF-8, got byte 0xe9"),
    "utf-16": ('{"format": 1}'.encode("utf-16"), "UTF-8, got byte 0xff"),
    "surrogate": (b'{"format": "\\ud800"}', "half of a surrogate"),
}

#: Bytes that are no file of safetensors.
BAD_TENSORS = {
    "empty": b"",
    "short": b"\0\0\0",
    "zeros": b"\0" * 100,
    "10 GB of head": safetensors({}, size=10 * 2**30),
    "all of 64 bits": safetensors({}, size=2**64 - 1),
    "head cut off": safetensors(b'{"a": {"dtype"'),
    "no object": safetensors([1]),
    "deep": safetensors(b"[" * 20_000),
    "not UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "10 GB of tensor": safetensors({"a": tensor([2**31], 2**33)}, b"\0" * 8),
    "shape overflows": safetensors({"a": tensor([2**40, 2**40], 8)}, b"\0" * 8),
    "shape and size differ": safetensors({"a": tensor([3], 8)}, b"\0" * 8),
    "offsets backwards": safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8),
    "negative shape": safetensors({"a": tensor([-2], 8)}, b"\0" * 8),
    "no such dtype": safetensors({"a": tensor([2], 8, "F31")}, b"\0" * 8),
    "bytes left over": safetensors({"a": tensor([2], 8)}, b"\0" * 9),
}


def refused(load, *names: object) -> None:
    """Loading fails with one line that has these names."""
    with pytest.raises(ArgumentError) as caught:
        load()
    text = str(caught.value)
    assert all(str(name) in text for name in names), text
    assert "\n" not in text and len(text) < 700
