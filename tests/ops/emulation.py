"""Builds the modules that run the code of CUDA kernels on the CPU (`emulated_lanes.h`)."""

from __future__ import annotations

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
#: Every access to memory becomes a call, which emulated_lanes.cpp answers; calls stay where they stand in the code.
WATCHED = ("-fsanitize=thread", "-O1", "-fno-optimize-sibling-calls")


def build(
    folder: Path, name: str, kernels: str, *options: str, csrc: Path = ROOT / "csrc"
) -> ModuleType:
    """The module `<name>` from <name>.cpp, <kernels>.cpp under watch and the emulation, compiled in `folder`."""
    pybind11 = pytest.importorskip("pybind11")
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folders = (
        HERE, csrc, csrc / "include", pybind11.get_include(), sysconfig.get_path("include")
    )  # fmt: skip
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", *(f"-I{f}" for f in folders)]
    plain = {"emulated_lanes": ("-O2",), "emulated_warp": ("-O2",), name: ()}
    objects = []
    for stem, flags in (plain | {kernels: (*WATCHED, *options)}).items():
        objects.append(str(folder / f"{stem}.o"))
        command = [COMPILER, *common, *flags, "-c", str(HERE / f"{stem}.cpp"), "-o", objects[-1]]
        subprocess.run(command, check=True)
    file = folder / f"{name}.so"
    subprocess.run([COMPILER, "-shared", *objects, "-o", str(file)], check=True)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
