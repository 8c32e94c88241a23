"""JSON and safetensors that others wrote: read, or refused in one line that names the file and the reason."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from cvg_kernels.errors import ArgumentError
from cvg_kernels.reading import (
    check_shapes,
    parse_json,
    read_bytes,
    read_json,
    read_object,
    read_tensors,
    tensor_headers,
)
from tests.trust.files import BAD_JSON, BAD_TENSORS, pickled, saved_by_torch


def one_line(error: BaseException, path) -> str:
    text = str(error)
    assert str(path) in text and "\n" not in text and len(text) < 400
    return text


@pytest.mark.parametrize("name", BAD_JSON)
def test_what_is_no_object_is_refused(name, tmp_path):
    data, why = BAD_JSON[name]
    path = tmp_path / "some.json"
    path.write_bytes(data)
    with pytest.raises(ArgumentError) as caught:
        read_object(path)
    assert why in one_line(caught.value, path)


def test_good_json_is_what_was_written(tmp_path):
    path = tmp_path / "good.json"
    numbers = [random.uniform(-1e30, 1e30), random.getrandbits(64), -random.getrandbits(63), 0.1]
    content = {"numbers": numbers, "text": "é\u2028𝄞", "deep": [[{"a": [None, True]}]]}
    for encoding in ("utf-8", "utf-8-sig"):
        for ascii_only in (True, False):
            path.write_text(json.dumps(content, ensure_ascii=ascii_only), encoding=encoding)
            assert read_json(path) == content


def test_sizes_are_bounded(tmp_path):
    path = tmp_path / "large.json"
    path.write_bytes(b"[" + b" " * 1000 + b"]")
    assert read_bytes(path, most=1002)
    with pytest.raises(ArgumentError, match="at most 1001 bytes"):
        read_bytes(path, most=1001)


def test_what_never_ends_is_not_read(tmp_path):
    """A pipe that nobody writes to would be waited for, a device be read for ever."""
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", "/dev/zero", tmp_path):
        with pytest.raises(ArgumentError, match="must be a file"):
            read_json(path)
        with pytest.raises(ArgumentError, match="must be a file"):
            tensor_headers(path)
    with pytest.raises(ArgumentError, match="at most 64 bytes"):
        read_bytes("/dev/zero", most=64, pipes=True)


def test_links_are_followed_as_the_hubs_cache_needs(tmp_path):
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to(tmp_path / "blob")
    (tmp_path / "round.json").symlink_to(tmp_path / "round.json")
    (tmp_path / "lost.json").symlink_to(tmp_path / "nowhere")
    assert read_object(tmp_path / "link.json") == {"a": 1}
    for name in ("round.json", "lost.json"):
        with pytest.raises(ArgumentError, match="cannot be read"):
            read_object(tmp_path / name)
        with pytest.raises(ArgumentError, match="cannot be read"):
            tensor_headers(tmp_path / name)


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_what_is_no_file_of_tensors_is_refused(name, tmp_path):
    path = tmp_path / "some.safetensors"
    path.write_bytes(BAD_TENSORS[name])
    for read in (tensor_headers, read_tensors):
        with pytest.raises(ArgumentError) as caught:
            read(path)
        one_line(caught.value, path)


def test_random_bytes_are_refused_or_read(tmp_path):
    """A good file with bytes changed, and with its end cut off: tensors or one of our errors, nothing else."""
    path, whole = tmp_path / "some.safetensors", tmp_path / "whole.safetensors"
    save_file({"a": torch.randn(3, 5), "b": torch.arange(7)}, whole, metadata={"x": "y"})
    data, ends = whole.read_bytes(), {"read": 0, "refused": 0}
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(random.randint(1, 4)):
            changed[random.randrange(len(data))] = random.randrange(256)
        path.write_bytes(changed[: random.choice([len(data), random.randrange(len(data))])])
        try:
            read_tensors(path)
            ends["read"] += 1
        except ArgumentError as error:
            ends["refused"] += 1
            assert str(path) in str(error)
    assert all(ends.values())


def test_tensors_are_those_that_are_asked_for(tmp_path):
    path = tmp_path / "some.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(2), "c": torch.arange(3)}
    save_file(tensors, path)
    shapes = {name: tuple(one.shape) for name, one in tensors.items()}
    assert all(torch.equal(one, tensors[name]) for name, one in read_tensors(path, shapes).items())
    check_shapes(path, {"a": (3, 5)}, part="a")
    for change, why in (
        ({"a": (5, 3)}, r"'a' of shape \[5, 3\], got \[3, 5\]"),
        ({"d": (1,)}, "lacks d"),
        ({"a": None}, "beside what it should, a"),
    ):
        wanted = {name: shape for name, shape in (shapes | change).items() if shape is not None}
        with pytest.raises(ArgumentError, match=why):
            read_tensors(path, wanted)
    tensors["b"][random.randrange(2)] = random.choice([torch.nan, torch.inf, -torch.inf])
    save_file(tensors, path)
    assert read_tensors(path, shapes)
    with pytest.raises(ArgumentError, match="finite numbers, got infinity or NaN in 'b'"):
        read_tensors(path, shapes, finite=True)


@pytest.mark.drawn(8, of="long tests")
def test_a_pickle_is_no_file_of_ours(tmp_path):
    """And the pickle does run code where it is unpickled, or this test would show nothing."""
    mark, path = tmp_path / "mark", tmp_path / "some.file"
    for write in (lambda: path.write_bytes(pickled(mark)), lambda: saved_by_torch(path, mark)):
        write()
        for read in (read_object, read_tensors, tensor_headers):
            with pytest.raises(ArgumentError, match="some.file"):
                read(path)
    assert not mark.exists()
    code = f"import torch; torch.load({str(path)!r}, weights_only=False)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert mark.exists()


def test_a_surrogate_pair_is_a_character():
    assert parse_json(r'"\ud834\udd1e"', "here") == "𝄞"
