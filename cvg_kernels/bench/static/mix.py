"""What a stretch of SASS does: instructions by kind, products, bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cvg_kernels.bench.static.sass import Instruction

#: Matrix products: of a warp, of Hopper's warp groups, of Blackwell's tensor memory.
TENSOR = ("HMMA", "HGMMA", "QMMA", "QGMMA", "UTCHMMA", "UTCQMMA")
#: Products of a `tcgen05` instruction are not in its opcode: their size stands in a descriptor.
UNSIZED = ("UTCHMMA", "UTCQMMA")
_FP32 = {"FFMA": 1, "FADD": 1, "FMUL": 1, "FFMA2": 2, "FADD2": 2, "FMUL2": 2}
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)(?=\.|$)")


@dataclass(frozen=True)
class Mix:
    """Counts per warp, of instructions unless said otherwise.

    Attributes:
        total: all instructions.
        opcodes: tensor instructions by opcode, `HGMMA.64x64x16` for instance.
        tensor_flops: floating-point operations of the tensor instructions whose size stands in the opcode.
        exp2: MUFU.EX2.
        mufu: all MUFU, MUFU.EX2 among them.
        fp32: FFMA, FADD, FMUL; a packed one counts twice.
        fma: FFMA alone, as a product of float32 without tensor cores.
        async_copies: LDGSTS, global to shared memory without registers.
        tma: UTMALDG, bulk copies of the tensor memory accelerator.
        global_loads: LDG.
        narrow_loads: LDG of two bytes a lane.
        global_bytes: read by LDG and LDGSTS.
        shared: LDS, STS, LDSM, STSM.
        shared_bytes: moved by those, LDGSTS and the operands of HGMMA.
        barriers: BAR.
        local: LDL and STL, which spilled registers need.
        setmaxreg: USETMAXREG, by which specialised warps trade registers.
    """

    total: int
    opcodes: dict[str, int]
    tensor_flops: int
    exp2: int
    mufu: int
    fp32: int
    fma: int
    async_copies: int
    tma: int
    global_loads: int
    narrow_loads: int
    global_bytes: int
    shared: int
    shared_bytes: int
    barriers: int
    local: int
    setmaxreg: int

    @property
    def tensor(self) -> int:
        """Tensor instructions."""
        return sum(self.opcodes.values())

    @property
    def unsized(self) -> bool:
        """Whether there are tensor instructions whose size is not in the opcode."""
        return any(opcode.partition(".")[0] in UNSIZED for opcode in self.opcodes)


def mix_of(instructions: Iterable[Instruction]) -> Mix:
    """Counts a stretch of code, each instruction once."""
    code = list(instructions)
    names = Counter(instruction.name for instruction in code)
    of = {name: [i for i in code if i.name == name] for name in names}

    def all_of(*wanted: str) -> list[Instruction]:
        return [instruction for name in wanted for instruction in of.get(name, ())]

    tensor = all_of(*TENSOR)
    loads, copies = all_of("LDG"), all_of("LDGSTS")
    staged = all_of("LDS", "STS", "LDSM", "STSM")
    return Mix(
        total=len(code),
        opcodes=dict(sorted(Counter(_short(i.opcode) for i in tensor).items())),
        tensor_flops=sum(map(_flops, tensor)),
        exp2=sum(i.opcode.startswith("MUFU.EX2") for i in all_of("MUFU")),
        mufu=names["MUFU"],
        fp32=sum(names[name] * count for name, count in _FP32.items()),
        fma=names["FFMA"] + 2 * names["FFMA2"],
        async_copies=len(copies),
        tma=names["UTMALDG"],
        global_loads=len(loads),
        narrow_loads=sum(_lane_bytes(i) == 2 for i in loads),
        global_bytes=32 * sum(map(_lane_bytes, loads + copies)),
        shared=len(staged),
        shared_bytes=sum(map(_shared_bytes, staged + copies + all_of("HGMMA"))),
        barriers=names["BAR"],
        local=names["LDL"] + names["STL"],
        setmaxreg=names["USETMAXREG"],
    )


def _short(opcode: str) -> str:
    """`HGMMA.64x64x16` of `HGMMA.64x64x16.F32.BF16`."""
    return ".".join(opcode.split(".")[: 1 if opcode.startswith(UNSIZED) else 2])


def _shape(instruction: Instruction) -> tuple[int, int, int] | None:
    """Rows, columns and depth of a product, `None` where the opcode does not tell."""
    if match := re.search(r"\.(\d+)x(\d+)x(\d+)\b", instruction.opcode):
        return int(match[1]), int(match[2]), int(match[3])
    if match := re.search(r"\.16(8)(4|8|16|32)\b", instruction.opcode):
        return 16, int(match[1]), int(match[2])
    return None


def _flops(instruction: Instruction) -> int:
    """Operations of a tensor instruction, per warp."""
    if instruction.name in UNSIZED:
        return 0
    shape = _shape(instruction)
    if shape is None:
        raise ValueError(f"the size of {instruction.opcode} is not known to this reader")
    rows, columns, depth = shape
    warps = 4 if instruction.name.endswith("GMMA") else 1
    return 2 * rows * columns * depth // warps


def _lane_bytes(instruction: Instruction) -> int:
    """Bytes a lane that a load, store or copy moves."""
    width = _WIDTH.search(instruction.opcode)
    if width is None:
        return 4
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(width[1]) or int(width[1]) // 8


def _shared_bytes(instruction: Instruction) -> int:
    """Bytes of shared memory that an instruction moves, per warp."""
    if instruction.name in ("LDSM", "STSM"):  # so many tiles of 8 by 8 two-byte numbers
        tiles = re.search(r"\.(\d)$", instruction.opcode)
        return 128 * (int(tiles[1]) if tiles else 1)
    if instruction.name == "HGMMA":  # 32 bytes a row of each operand that lies there; of four warps
        rows, columns, _ = _shape(instruction)
        first = instruction.operands.split(",")[1].strip()
        return 32 * (columns + (rows if first.startswith("gdesc") else 0)) // 4
    return 32 * _lane_bytes(instruction)
