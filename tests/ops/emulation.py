"""Builds the modules that run the code of CUDA kernels on the CPU (`emulated_lanes.h`)."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
#: Every access to memory becomes a call, which emulated_watch.cpp answers; calls stay where they stand in the code.
WATCHED = ("-fsanitize=thread", "-O1", "-fno-optimize-sibling-calls")
#: Under `make sanitize` the compiler's own sanitizers look in the place of the watch, at the emulation as well.
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1")
if os.environ.get("CVG_SANITIZED") != "address":
    SANITIZED = ()


def build(folder: Path, name: str, kernels: str, *options: str, csrc: Path = ROOT / "csrc") -> ModuleType:
    """The module `<name>` of <name>.cpp, of <kernels>.cpp under watch, compiled with `options`, and of the emulation.

    Objects that are not under watch stay in `folder` for the next module.
    """
    pybind11 = pytest.importorskip("pybind11")
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folders = (HERE, csrc, csrc / "include", pybind11.get_include(), sysconfig.get_path("include"))
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", *(f"-I{f}" for f in folders)]
    stems = ("emulated_lanes", "emulated_watch", "emulated_warp", name)
    objects = [folder / f"{stem}.o" for stem in stems]
    for file, level in zip(objects, ("-O2", "-O2", "-O2", "-O0"), strict=True):
        if not file.exists():
            source = HERE / f"{file.stem}.cpp"
            subprocess.run([COMPILER, *common, level, *SANITIZED, "-c", source, "-o", file], check=True)
    number = len(list(folder.glob("*.so")))
    watched = folder / f"{kernels}-{number}.o"
    flags = [*common, *(SANITIZED or WATCHED), *options]
    subprocess.run([COMPILER, *flags, "-c", HERE / f"{kernels}.cpp", "-o", watched], check=True)
    file = folder / f"{name}-{number}.so"
    subprocess.run([COMPILER, "-shared", *SANITIZED, *objects, watched, "-o", file], check=True)
    return load(file)


def load(file: Path) -> ModuleType:
    """The module `<name>` of <name>-<number>.so."""
    name, _, number = file.stem.rpartition("-")
    # pybind11 3.1 gives the module back that it made first under a full name.
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{number}.{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_once(folder: Path, name: str, kernels: str) -> ModuleType:
    """What `build` makes of the sources as they are, in one of the processes that test."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        there = next(folder.glob(f"{name}-*.so"), None)
        return load(there) if there else build(folder, name, kernels)


def changed_sources(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc/ in `folder` with one place of one file changed."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
    (csrc / file).write_text(text.replace(old, new))
    return csrc
