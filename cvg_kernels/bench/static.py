"""What the compiler makes of every Triton kernel, for GPUs that need not be there: registers, spills, tensor cores."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Variant:
    """A use of attention with capture: one layer of a real model, in one precision."""

    name: str
    dtype: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    tokens: int = 8
    masked: bool = False

    def launches(self) -> Iterator[tuple[str, Any]]:
        """Every launch it makes, named: forward with values and maps alone, backward to the query and to everything."""
        import torch

        from cvg_kernels._triton import attention

        dtype = getattr(torch, self.dtype)
        with torch.device("meta"):
            query = torch.empty(self.batch, self.heads, self.queries, self.dim, dtype=dtype)
            key, value = torch.empty(2, self.batch, self.heads, self.keys, self.dim, dtype=dtype)
            ids = torch.empty(self.batch, self.tokens, dtype=torch.int64)
            bias = torch.empty(self.batch, self.keys) if self.masked else None
        for values in (value, None):
            launches, (out, maps, lse) = attention.forward_launches(
                query, key, values, ids, bias, 0.1, True, processors=132
            )
            grad_out = None if values is None else torch.empty_like(out)
            for everything in (False, True):
                launches += attention.backward_launches(
                    grad_out, maps, None, query, key, values, ids, bias, out, lse, 0.1, True,
                    True, everything, everything and values is not None,
                )[0]  # fmt: skip
            for launch in launches:
                name = launch.kernel.fn.__name__
                constants = launch.constants
                apart = constants.get("HAS_OUT") is False or constants.get("HAS_VALUE") is False
                yield name + ", maps only" if apart else name, launch


@dataclass(frozen=True)
class TemporalVariant:
    """A use of temporal attention with VSTAR's band."""

    name: str
    dtype: str
    positions: int
    heads: int
    frames: int
    dim: int

    def launches(self) -> Iterator[tuple[str, Any]]:
        """Every launch it makes, named: with and without maps, and with the band's own gradient."""
        import torch

        from cvg_kernels._triton import temporal_attention

        shape = (1, self.positions, self.frames, self.heads, self.dim)
        with torch.device("meta"):
            qkv = torch.empty(3, *shape, dtype=getattr(torch, self.dtype)).transpose(3, 4).unbind(0)
            band = torch.empty(self.frames, self.frames)
        for capture in (False, True):
            launch, (out, maps) = temporal_attention.forward_launch(*qkv, band, 0.1, True, capture)
            name = launch.kernel.fn.__name__
            yield name + ", maps" if capture else name, launch
        for grad_maps, to_band, suffix in (
            (None, False, ""),
            (maps, False, ", maps"),
            (maps, True, ", band"),
        ):
            launch, _ = temporal_attention.backward_launch(
                out, grad_maps, *qkv, band, 0.1, True, True, True, True, True, to_band
            )
            yield launch.kernel.fn.__name__ + suffix, launch


VARIANTS = (
    Variant("AnimateDiff cross", "bfloat16", 16, 8, 4096, 77, 40),
    Variant("VideoCrafter2 cross", "bfloat16", 16, 5, 2560, 77, 64),
    Variant("Wan-1.3B cross", "bfloat16", 1, 12, 32760, 512, 128),
    Variant("CogVideoX-2B joint", "bfloat16", 1, 30, 17776, 17776, 64),
    Variant("LTX cross, masked", "float16", 1, 32, 4992, 128, 64, masked=True),
    Variant("head_dim 256", "bfloat16", 1, 8, 4096, 512, 256),
    Variant("VideoCrafter2 cross", "float32", 16, 5, 2560, 77, 64),
    Variant("Wan-1.3B cross", "float32", 1, 12, 32760, 512, 128),
)
TEMPORAL_VARIANTS = (
    TemporalVariant("VideoCrafter2 16 frames", "bfloat16", 2560, 5, 16, 64),
    TemporalVariant("VideoCrafter2 64 frames", "bfloat16", 2560, 5, 64, 64),
    TemporalVariant("AnimateDiff 16 frames", "float16", 4096, 8, 16, 40),
    TemporalVariant("AnimateDiff 16 frames", "bfloat16", 1024, 8, 16, 80),
    TemporalVariant("VideoCrafter2 16 frames", "float32", 2560, 5, 16, 64),
)


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


def compile_variant(job: tuple[Variant | TemporalVariant, str]) -> list[StaticRow]:
    """Compiles the kernels of a variant for a target; a process pool calls this."""
    variant, target = job
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    rows = {}
    for name, launch in variant.launches():
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
    targets: Iterable[str] = TARGETS,
    variants: Iterable[Variant | TemporalVariant] = VARIANTS + TEMPORAL_VARIANTS,
    processes: int = 2,
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
    widths = (8, 23, 9, 30, 5, 7, 7, 6, 5)
    print("  ".join(name.ljust(width) for name, width in zip(head, widths, strict=True)))
    for row in rows:
        cells = (
            row.target, row.variant, row.dtype, row.kernel, row.registers, row.spills, row.shared_bytes,
            "-" if row.wgmma is None else row.wgmma, row.mma,
        )  # fmt: skip
        print("  ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)))
