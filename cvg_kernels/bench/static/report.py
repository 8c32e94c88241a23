"""The table on the screen."""

from __future__ import annotations

from collections.abc import Iterable

from cvg_kernels.bench.static.compiled import LoopRow, StaticRow
from cvg_kernels.bench.static.objects import ObjectRow

_HEAD = ("target", "variant", "dtype", "kernel", "regs", "spills", "shared", "blocks", "fill", "matrix")
_WIDTHS = (7, 24, 9, 46, 4, 6, 7, 6, 5, 6)


def print_table(rows: Iterable[StaticRow]) -> list[StaticRow]:
    """Prints a line per kernel, and one per loop that carries matrix products, as they come; returns them."""
    shown = []
    print(
        "blocks: resident on a multiprocessor; fill: share of the processors' time that the programs take; matrix: "
        "tensor-core instructions.\nOf a loop: instructions a turn and warp, instructions a lane and score element, "
        "asynchronous copies, and the modelled\n(not measured) fraction of peak, an upper limit, with what limits it. "
        "The model: cvg_kernels/bench/static/model.py"
    )
    print(_line(_HEAD))
    for row in rows:
        matrix = row.mma + (row.wgmma or 0)
        print(
            _line(
                (
                    row.target,
                    row.variant,
                    row.dtype,
                    row.kernel,
                    row.registers,
                    row.spills,
                    row.shared_bytes,
                    "-" if row.resident is None else row.resident,
                    row.fill,
                    matrix,
                )
            )
        )
        for loop in row.loops:
            print("    " + _loop(loop), flush=True)
        shown.append(row)
    return shown


def print_objects(rows: Iterable[ObjectRow]) -> None:
    """Prints a line per kernel of the CUDA module."""
    for row in rows:
        print(
            f"{row.target:7}  {row.registers:3} registers  {row.stack_bytes:5} bytes of stack  "
            f"{row.shared_bytes:6} of shared memory  {row.kernel}"
        )


def _line(cells: tuple) -> str:
    return "  ".join(str(cell).ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True))


def _loop(loop: LoopRow) -> str:
    over = f" over {loop.of}" if loop.of else ""
    text = f"loop{over}, depth {loop.depth}: {loop.instructions} instructions, {loop.async_copies} copies"
    if loop.per_element is not None:
        text += f", {loop.per_element} a score element, modelled {loop.fraction:.2f} of peak by {loop.limit}"
    if loop.repeated not in (None, 1.0):
        text += f", products computed {loop.repeated} times"
    return text
