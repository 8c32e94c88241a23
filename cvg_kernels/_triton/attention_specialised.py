"""Attention with captured tokens on Hopper, its forward kernel specialised by warps; the rest is the Triton backend's.

Queries, keys and values come by tensor descriptors that each program makes, in memory that Triton asks of an
allocator. That one is set in a copy of the caller's context, for the launch alone: the process's own allocator stays
what it is.
"""

from __future__ import annotations

import math
from contextvars import copy_context

import torch
import triton

from cvg_kernels._layout import dense_like
from cvg_kernels._triton.attention import backward, capture
from cvg_kernels._triton.attention_arguments import add_tensor, tiled_launch
from cvg_kernels._triton.attention_forward import capture_launches
from cvg_kernels._triton.attention_specialised_kernel import UNIT, specialised_kernel
from cvg_kernels._triton.attention_tiles import Tile
from cvg_kernels._triton.launch import INTERPRETED, Launch
from cvg_kernels.ops._attention_call import AttentionCall, AttentionResult

__all__ = ["backward", "capture", "forward", "forward_launches"]

_UNIT = UNIT.value


#: Its 4 warps are those of one group of consumers: of 128 rows the compiler makes two groups, and adds a producer.
#: With 8 warps it leaves the loop as it is, without a word.
_TILE = Tile(128, 128, 4, 2)


def forward_launches(call: AttentionCall, *, processors: int | None = None) -> tuple[list[Launch], AttentionResult]:
    """The launches of the forward pass, and the tensors they fill.

    Args:
        call: the arguments, within the limits of the table of kernels.
        processors: multiprocessors to plan the capture of maps for; `None` asks the device.
    """
    query = call.query
    batch, heads, queries, dim = query.shape
    keys = call.key.shape[2]
    out = dense_like(query, dim)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if not call.scale > 0:  # the kernel's factor is positive; this is exact in every dtype
        query = query * (math.copysign(1.0, call.scale) if call.scale else 0.0)
    arguments = {
        "lse": lse, "heads": heads, "queries": queries, "keys": keys, "factor": abs(call.scale) or 1.0,
        **_described("query", query), **_described("key", call.key), **_described("value", call.value),
    }  # fmt: skip
    constants = {
        "DIM": dim, "STAGES": _TILE.stages, "TAIL": keys % _TILE.columns != 0, "UPCAST": INTERPRETED,
    }  # fmt: skip
    add_tensor(arguments, constants, "out", out)
    grid = (-(-queries // _TILE.rows) * batch * heads,)
    launches, maps = [tiled_launch(specialised_kernel, grid, arguments, constants, _TILE)], None
    if call.token_ids is not None:
        captures, maps = capture_launches(call, lse, processors=processors)
        launches += captures
    return launches, AttentionResult(out, maps, lse)


def forward(call: AttentionCall) -> AttentionResult:
    """Out, maps and lse of a call; see `cvg_kernels.ops._attention_call`."""
    launches, result = forward_launches(call)
    copy_context().run(_run, launches, call.query.device)
    return result


def _run(launches: list[Launch], device: torch.device) -> None:
    def allocate(size: int, alignment: int, stream) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
    for launch in launches:
        launch.run()


def _described(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """A tensor `[B, H, N, D]` and its strides in units of 8 elements, as descriptors take them.

    In place of a tensor that none takes — rows that do not begin at multiples of 16 bytes, a last axis that is not
    dense, an expanded axis — stands a dense copy.
    """
    if not _describable(tensor):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    # An axis of one element has whatever stride torch left there.
    sizes, steps = tensor.shape, tensor.stride()
    b, h, n = (step // _UNIT if size > 1 else 1 for size, step in zip(sizes[:3], steps[:3], strict=True))
    return {name: tensor, f"{name}_b": b, f"{name}_h": h, f"{name}_n": n}


def _describable(tensor: torch.Tensor) -> bool:
    """Whether a descriptor takes a tensor of 16-bit numbers as it lies in memory."""
    outer = [step for size, step in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    aligned = all(step > 0 and step % _UNIT == 0 for step in outer)
    return aligned and tensor.stride(3) == 1 and tensor.data_ptr() % (2 * _UNIT) == 0
