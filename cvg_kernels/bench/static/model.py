"""A model of how near a loop can come to the peak of a GPU, from its machine code alone. Never a measurement.

One turn of a loop is done by `warps` warps on one multiprocessor and covers `elements` scores. In clock cycles of the
multiprocessor it takes at least

    tensor  executed products / products a clock         (wasted ones too: padded head_dim, columns computed twice)
    issue   instructions · warps / 4                     (four schedulers, one instruction a clock each)
    exp     MUFU · warps · 32 lanes / 16
    fp32    (FFMA + FADD + FMUL) · warps · 32 / lanes    (lanes: 128; 64 on sm_80)
    shared  bytes of shared memory / 128                 (LDS, STS, LDSM, STSM, LDGSTS, operands of HGMMA there)
    bytes   bytes from global memory / L2 bytes a clock

and the modelled fraction of peak is

    useful products / products a clock  ÷  max(of the six)

where useful products are those of the formula, with the true head_dim. Everything is taken to overlap perfectly, which
occupancy and latency never allow, so the fraction is an upper limit. Where it is low the kernel is slow; where it is
high it may be fast. The instruction budget is instructions · warps · 32 / elements: instructions a lane per score.

    fill    programs / (processors · ⌈programs / processors⌉)

is how evenly the programs of a launch fall on the processors: 39 programs on 132 processors fill 0.30 of them.
Of a loop with branches both sides count. Products of float32, done without tensor cores, count against FFMA.

Where the constants come from: shared memory, registers, warps and blocks per processor, and the throughput of FP32 and
MUFU from the tables "Technical Specifications per Compute Capability" and "Throughput of Native Arithmetic
Instructions" of NVIDIA's CUDA programming guide; dense 16-bit products a clock from the peak in the data sheets
divided by processors and boost clock, to a power of two (A100 312 TFLOP/s, 108, 1.41 GHz; A10 125, 72, 1.695; L40S
362, 142, 2.52; H100 SXM 989, 132, 1.83; B200 2250, 148, 1.85; RTX PRO 6000 504, 188, 2.62). GeForce cards of sm_86,
sm_89 and sm_120 sum such products in float32 at half that rate. L2: 5120 bytes a clock in all on A100 (its white
paper), taken for H100 and B200 also; 64 a processor elsewhere, the width of an L1 fill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cvg_kernels.bench.static.mix import Mix

_SCHEDULERS = 4
_LANES = 32
_MUFU_LANES = 16
_SHARED_BYTES = 128
_REGISTERS = 65536
#: Shared memory that the system takes from every block.
_RESERVED_BYTES = 1024


@dataclass(frozen=True)
class Architecture:
    """What the model knows of a GPU, per multiprocessor unless said otherwise.

    Attributes:
        card: the card that gives `processors` and `tensor_flops`.
        processors: multiprocessors.
        tensor_flops: dense 16-bit operations a clock, sums in float32.
        fp32_lanes: FFMA a clock.
        l2_bytes: from L2, a clock.
        block_shared: bytes of shared memory that one block may have.
        shared: bytes of all blocks.
        warps: resident at most.
        blocks: resident at most.
    """

    card: str
    processors: int
    tensor_flops: int
    fp32_lanes: int
    l2_bytes: float
    block_shared: int
    shared: int
    warps: int
    blocks: int


ARCHITECTURES = {
    "sm_80": Architecture("A100", 108, 2048, 64, 47, 163 << 10, 164 << 10, 64, 32),
    "sm_86": Architecture("A10", 72, 1024, 128, 64, 99 << 10, 100 << 10, 48, 16),
    "sm_89": Architecture("L40S", 142, 1024, 128, 64, 99 << 10, 100 << 10, 48, 24),
    "sm_90": Architecture("H100 SXM", 132, 4096, 128, 39, 227 << 10, 228 << 10, 64, 32),
    "sm_100": Architecture("B200", 148, 8192, 128, 35, 227 << 10, 228 << 10, 64, 32),
    "sm_120": Architecture("RTX PRO 6000", 188, 1024, 128, 64, 99 << 10, 100 << 10, 48, 24),
}
#: Local data share of a workgroup on AMD, bytes.
AMD_SHARED = {"gfx942": 64 << 10}


class Work(NamedTuple):
    """What one turn of a loop is for.

    Attributes:
        of: what the loop goes over: `keys`, `queries`, `heads` or `tokens`.
        elements: scores.
        flops: operations of its products by the formula, with the true head_dim.
        padded_flops: the same with head_dim padded to what the kernel computes.
    """

    of: str
    elements: int
    flops: int
    padded_flops: int


@dataclass(frozen=True)
class Modelled:
    """What the model says of a loop.

    Attributes:
        per_element: instructions a lane per score.
        fraction: fraction of peak, at most.
        limit: what is slowest, `issue` for instance.
        cycles: cycles of a turn, by limit.
        repeated: products executed per padded product; above 1, some are computed twice.
    """

    per_element: float
    fraction: float
    limit: str
    cycles: dict[str, float]
    repeated: float


def modelled(mix: Mix, work: Work, warps: int, architecture: Architecture) -> Modelled:
    """The model of one turn of a loop.

    Args:
        mix: what a warp does in a turn.
        work: what a turn of all warps is for. A loop that executes fewer products than that (specialised warps share a
            tile out) is taken to do its part of the work.
        warps: that run this loop together.
        architecture: the GPU.
    """
    rate, executed = architecture.tensor_flops, mix.tensor_flops * warps
    if mix.unsized:
        executed = work.padded_flops
    elif not mix.tensor:
        rate, executed = 2 * architecture.fp32_lanes, 2 * _LANES * mix.fma * warps
    part = min(1.0, executed / work.padded_flops)
    cycles = {
        "tensor": executed / rate if mix.tensor else 0.0,
        "issue": mix.total * warps / _SCHEDULERS,
        "exp": mix.mufu * warps * _LANES / _MUFU_LANES,
        "fp32": mix.fp32 * warps * _LANES / architecture.fp32_lanes,
        "shared": mix.shared_bytes * warps / _SHARED_BYTES,
        "bytes": mix.global_bytes * warps / architecture.l2_bytes,
    }
    limit = max(cycles, key=cycles.get)
    return Modelled(
        per_element=mix.total * warps * _LANES / (work.elements * part),
        fraction=min(1.0, work.flops * part / rate / cycles[limit]),
        limit=limit,
        cycles=cycles,
        repeated=executed / (work.padded_flops * part),
    )


def blocks_resident(registers: int, shared_bytes: int, warps: int, architecture: Architecture) -> int:
    """Blocks that one multiprocessor holds at once; 0 where not even one fits."""
    if shared_bytes > architecture.block_shared:
        return 0
    warp_registers = -(-registers * _LANES // 256) * 256
    return min(
        architecture.blocks,
        architecture.warps // warps,
        _REGISTERS // (warp_registers * warps),
        architecture.shared // (shared_bytes + _RESERVED_BYTES),
    )


def fill(programs: int, processors: int) -> float:
    """The share of the processors' time that programs of equal length take, 0 for none."""
    return programs / (processors * -(-programs // processors)) if programs else 0.0
