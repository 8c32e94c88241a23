"""What the compiler makes of Triton kernels, for GPUs that need not be there:
registers, spills, loops, tensor cores.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from cvg_kernels.bench.static import model, sass, work
from cvg_kernels.bench.static.mix import Mix, mix_of

TARGETS = (*model.ARCHITECTURES, *model.AMD_SHARED)


@dataclass(frozen=True)
class LoopRow:
    """A loop that carries matrix products. Counts are of one turn, without loops inside that carry products
    themselves.

    Attributes:
        depth: 0 for an outermost loop.
        inner: whether no loop inside carries products.
        of: what it goes over, `keys` for instance; `None` where that is not known.
        instructions: instructions of a warp.
        tensor: tensor instructions by opcode.
        exp2: MUFU.EX2.
        async_copies: LDGSTS and UTMALDG, which fetch the next tile while this one is computed.
        narrow_loads: loads of two bytes a lane.
        local: LDL and STL.
        per_element: instructions a lane per score; `None` where there is no inner loop, or no formula.
        fraction: modelled fraction of peak; `None` likewise.
        limit: what limits it.
        repeated: products executed per product of the padded formula.
    """

    depth: int
    inner: bool
    of: str | None
    instructions: int
    tensor: dict[str, int]
    exp2: int
    async_copies: int
    narrow_loads: int
    local: int
    per_element: float | None = None
    fraction: float | None = None
    limit: str | None = None
    repeated: float | None = None


@dataclass(frozen=True)
class StaticRow:
    """One compiled kernel. Counts are of machine instructions; `None` where the target's tools do not say.

    Attributes:
        variant: the layer.
        dtype: dtype of its tensors.
        target: the GPU, of `TARGETS`.
        kernel: its name and what is switched on in it.
        warps: warps of a program.
        stages: stages of the software pipeline.
        registers: registers of a lane.
        spills: LDL and STL, or AMD's spilled registers.
        shared_bytes: shared bytes of a program.
        resident: programs that one multiprocessor holds at once.
        fill: how evenly the programs fall on the processors, at most 1.
        wgmma: HGMMA, Hopper's product of four warps.
        mma: matrix products of a warp (HMMA; MFMA on AMD) or of Blackwell's tensor memory.
        narrow_loads: loads of two bytes a lane in the whole kernel.
        tma: UTMALDG in the whole kernel.
        specialised: USETMAXREG: warps have parts of their own.
        repeated: how often the warps compute each product; 1 is right.
        loops: that carry products, by address.
    """

    variant: str
    dtype: str
    target: str
    kernel: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared_bytes: int
    resident: int | None
    fill: float
    wgmma: int | None
    mma: int
    narrow_loads: int | None
    tma: int | None
    specialised: int | None
    repeated: float
    loops: tuple[LoopRow, ...] = ()


def target_of(name: str):
    """Triton's description of a target.

    Args:
        name: one of `TARGETS`.
    """
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def row_of(variant: str, dtype: str, target: str, launch) -> StaticRow:
    """Compiles one launch and reads what came of it.

    Args:
        variant: name of the layer.
        dtype: dtype of its tensors.
        target: one of `TARGETS`.
        launch: the `Launch`, with tensors on the meta device.
    """
    compiled = launch.compile(target_of(target))
    shared = compiled.metadata.shared
    nvidia = target.startswith("sm_")
    read = _nvidia(compiled, target, launch) if nvidia else _amd(compiled)
    processors = model.ARCHITECTURES[target].processors if nvidia else 304
    return StaticRow(
        variant,
        dtype,
        target,
        work.label(launch),
        launch.num_warps,
        launch.num_stages,
        shared_bytes=shared,
        fill=round(model.fill(prod(launch.grid), processors), 3),
        repeated=work.repeated_products(compiled.asm["ttgir"]),
        **read,
    )


def _amd(compiled) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))

    return {
        "registers": metadata("vgpr_count"),
        "spills": metadata("vgpr_spill_count"),
        "resident": None,
        "wgmma": None,
        "mma": len(re.findall(r"\bv_mfma", text)),
        "narrow_loads": None,
        "tma": None,
        "specialised": None,
    }


def _nvidia(compiled, target: str, launch) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def tool(name: str, *arguments: str) -> str:
            command = [str(tools / name), *arguments, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        registers = int(re.search(r"REG:(\d+)", tool("cuobjdump", "-res-usage")).group(1))
        code = tool("nvdisasm", "-c", "-ndf")  # without the analysis of data flow: half the time
    whole = mix_of(sass.instructions(code))
    architecture = model.ARCHITECTURES[target]
    return {
        "registers": registers,
        "spills": whole.local,
        "resident": model.blocks_resident(registers, compiled.metadata.shared, launch.num_warps, architecture),
        "wgmma": sum(n for name, n in whole.opcodes.items() if name.startswith("HGMMA")),
        "mma": sum(n for name, n in whole.opcodes.items() if not name.startswith("HGMMA")),
        "narrow_loads": whole.narrow_loads,
        "tma": whole.tma,
        "specialised": whole.setmaxreg,
        "loops": tuple(product_loops(code, launch, architecture)),
    }


def product_loops(code: str, launch, architecture: model.Architecture) -> Iterator[LoopRow]:
    """The loops of a kernel that carry matrix products of their own, by address.

    Args:
        code: SASS.
        launch: what was compiled.
        architecture: for the model.
    """
    exact = launch.arguments["query"].dtype.itemsize == 4 if "query" in launch.arguments else False

    def has_products(loop: sass.Loop) -> bool:
        return _products(mix_of(loop.body), exact)

    for outermost in sass.loops(code):
        for loop in outermost.all():
            own = mix_of(loop.without(has_products))
            if not _products(own, exact):
                continue
            inner = not any(has_products(below) for below in loop.all() if below is not loop)
            purpose = work.work_of(launch, own) if inner else None
            row = LoopRow(
                loop.depth,
                inner,
                purpose.of if purpose else None,
                own.total,
                own.opcodes,
                own.exp2,
                own.async_copies + own.tma,
                own.narrow_loads,
                own.local,
            )
            if purpose is None:
                yield row
                continue
            said = model.modelled(own, purpose, launch.num_warps, architecture)
            yield LoopRow(
                **asdict(row)
                | {
                    "per_element": round(said.per_element, 2),
                    "fraction": round(said.fraction, 3),
                    "limit": said.limit,
                    "repeated": round(said.repeated, 2),
                }
            )


def _products(mix: Mix, exact: bool) -> bool:
    """Whether there are matrix products; of float32 (exact), FFMA in numbers that nothing else needs."""
    return mix.tensor > 0 or (exact and mix.fma >= 64)


def compile_job(job: tuple) -> list[StaticRow]:
    """Compiles what a case asks for; a process pool calls this.

    Args:
        job: variant, target and, if not all, the parts of the variant that are wanted.
    """
    variant, target, parts = job
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    architecture = model.ARCHITECTURES.get(target)
    processors = architecture.processors if architecture else 304
    rows = {}
    for launch in variant.launches(processors, target == "sm_90", parts):
        name = work.label(launch)
        if name not in rows:
            rows[name] = row_of(variant.name, variant.dtype, target, launch)
    return list(rows.values())


def collect(jobs: Iterable[tuple], processes: int = 2) -> Iterator[StaticRow]:
    """Compiles the kernels of many cases, and yields them as they come.

    Args:
        jobs: variant, target and parts, as in `cases`.
        processes: compilers at work at once.

    Raises:
        RuntimeError: kernels are interpreted in this process, so cannot be compiled.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    with ProcessPoolExecutor(processes) as pool:
        for rows in pool.map(compile_job, jobs):
            yield from rows
