"""What nvcc made of the CUDA kernels: registers and stack, read from a module that was built."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

#: What nvcc puts in the name of a kernel in an anonymous namespace: its file, and numbers that differ between builds.
_ANONYMOUS = re.compile(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}")
_ARCHITECTURE = re.compile(r"^arch = (sm_\d+)\w*$")
_FUNCTION = re.compile(r"^ Function (\S+):$")
_USAGE = re.compile(r"^  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class ObjectRow:
    """One kernel for one GPU.

    Attributes:
        kernel: its mangled name, the same in every build.
        target: the GPU.
        registers: registers of a lane.
        stack_bytes: local memory of a lane: spilled registers, and arrays with indices known at run time only.
        shared_bytes: shared bytes of a block, what launches add at run time excepted.
    """

    kernel: str
    target: str
    registers: int
    stack_bytes: int
    shared_bytes: int


def usage(text: str) -> list[ObjectRow]:
    """The kernels that a listing names.

    Args:
        text: text of `cuobjdump -res-usage`.
    """
    rows, target, kernel = [], "", ""
    for line in text.splitlines():
        if match := _ARCHITECTURE.match(line):
            target = match[1]
        elif match := _FUNCTION.match(line):
            kernel = _ANONYMOUS.sub(r"\1", match[1])
        elif match := _USAGE.match(line):
            registers, stack, shared, local = map(int, match.groups())
            rows.append(ObjectRow(kernel, target, registers, stack + local, shared))
    return rows


def module_rows(module: Path) -> list[ObjectRow]:
    """The kernels of a built module.

    Args:
        module: the shared library.

    Raises:
        RuntimeError: the library holds no kernel.
    """
    rows = usage(_dumped("-res-usage", str(module)))
    if not rows:
        raise RuntimeError(f"{module} holds no CUDA kernel")
    return rows


def compiler(module: Path) -> str:
    """The version of nvcc that made a module, as it stands in it.

    Args:
        module: the shared library.

    Raises:
        RuntimeError: it stands nowhere.
    """
    with tempfile.TemporaryDirectory() as folder:  # the kernels are packed in the library
        _dumped("-xelf", "all", str(module.resolve()), folder=folder)
        for file in Path(folder).iterdir():
            if match := re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", file.read_bytes()):
                return match[1].decode()
    raise RuntimeError(f"{module} does not tell its compiler")


def _dumped(*arguments: str, folder: str | None = None) -> str:
    """What `cuobjdump` says, run in a folder."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def built_module() -> Path | None:
    """The package's CUDA module, if it was built."""
    import cvg_kernels

    return next(Path(cvg_kernels.__file__).parent.glob("_native_cuda*.so"), None)
