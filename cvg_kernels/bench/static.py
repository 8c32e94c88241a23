"""What the compiler makes of every Triton kernel, for GPUs that need not be there: registers, spills, tensor cores."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from cvg_kernels.bench.variants import VARIANTS, Variant

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class StaticRow:
    """One compiled kernel. Counts are of machine instructions; `None` where the target's tools do not say."""

    variant: str
    dtype: str
    target: str
    kernel: str
    registers: int | None
    spills: (
        int | None
    )  #: instructions that touch local memory (LDL, STL), or AMD's spilled registers
    shared_bytes: int
    wgmma: int | None  #: HGMMA: Hopper's warp-group matrix product
    mma: int | None  #: HMMA and kin: matrix products of a warp, MFMA on AMD


def _target(name: str):
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def compile_variant(job: tuple[Variant, str]) -> list[StaticRow]:
    """Compiles the kernels of a variant for a target; a process pool calls this."""
    variant, target = job
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    rows = {}
    for launch in variant.launches():
        name = launch.kernel.fn.__name__
        if launch.constants.get("HAS_OUT") is False or launch.constants.get("HAS_VALUE") is False:
            name += ", maps only"
        if launch.constants.get("MAPS"):
            name += ", maps"
        if launch.constants.get("NEED_ADDED"):
            name += ", band"
        if launch.constants.get("SOFT"):
            name += ", soft"
        if name not in rows:
            compiled = launch.compile(_target(target))
            rows[name] = StaticRow(
                variant.name,
                variant.dtype,
                target,
                name,
                shared_bytes=compiled.metadata.shared,
                **_resources(compiled, target),
            )
    return list(rows.values())


def _resources(compiled, target: str) -> dict[str, int | None]:
    """Registers and instructions of note, from the machine code."""
    if not target.startswith("sm_"):
        text = compiled.asm["amdgcn"]

        def metadata(key: str) -> int:
            return int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))

        return {
            "registers": metadata("vgpr_count"),
            "spills": metadata("vgpr_spill_count"),
            "wgmma": None,
            "mma": len(re.findall(r"\bv_mfma", text)),
        }
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def tool(name: str, *arguments: str) -> str:
            command = [str(tools / name), *arguments, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = tool("cuobjdump", "-res-usage")
        code = tool("nvdisasm", "-c")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wgmma": len(re.findall(r"\bHGMMA\b", code)),
        "mma": len(re.findall(r"\b(?:HMMA|UTCHMMA|UTCQMMA)\b", code)),
    }


def collect(
    targets: Iterable[str] = TARGETS, variants: Iterable[Variant] = VARIANTS, processes: int = 2
) -> list[StaticRow]:
    """Compiles every variant for every target.

    Args:
        targets: of `TARGETS`.
        variants: which uses.
        processes: compilers at work at once.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    jobs = [(variant, target) for target in targets for variant in variants]
    with ProcessPoolExecutor(processes) as pool:
        return [row for rows in pool.map(compile_variant, jobs) for row in rows]


def as_json(rows: list[StaticRow]) -> list[dict]:
    """The rows as plain data."""
    return [asdict(row) for row in rows]


def print_table(rows: list[StaticRow]) -> None:
    """Prints one line per kernel."""
    head = ("target", "variant", "dtype", "kernel", "regs", "spills", "shared", "wgmma", "mma")
    widths = (8, 23, 9, 36, 5, 7, 7, 6, 5)
    print("  ".join(name.ljust(width) for name, width in zip(head, widths, strict=True)))
    for row in rows:
        cells = (
            row.target, row.variant, row.dtype, row.kernel, row.registers, row.spills, row.shared_bytes,
            "-" if row.wgmma is None else row.wgmma, row.mma,
        )  # fmt: skip
        print("  ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)))
