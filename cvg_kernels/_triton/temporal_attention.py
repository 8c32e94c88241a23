"""Launchers of temporal attention: they allocate, choose tiles by a table, and launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvg_kernels._layout import dense_like
from cvg_kernels._triton.launch import INTERPRETED, Launch, next_power_of_2, padded, strides, unit_strides
from cvg_kernels._triton.temporal_attention_kernels import temporal_backward_kernel, temporal_forward_kernel

#: Programs that share out the tiles where each sums a gradient of its own.
_SUMMING_PROGRAMS = 1024


@dataclass(frozen=True)
class Tile:
    """Rows of a tile, the sequences it holds, and how many warps work on it."""

    rows: int
    sequences: int
    warps: int


def tile_of(frames: int, element_size: int, *, summing: bool = False) -> Tile:
    """The tile for sequences of some length: whole sequences, and no more than registers hold.

    Args:
        frames: length of a sequence.
        element_size: bytes of an element.
        summing: whether the gradient of the band is summed, which takes registers too.
    """
    # Products are of whole tiles: the smallest that suits tensor cores wastes least on what the mask hides.
    rows = max(16 if element_size == 4 else 32, next_power_of_2(frames))
    if element_size == 4:
        return Tile(rows, rows // frames, 8)
    # 8 warps on less than 128 rows make every product of logits twice; where they share sums that is the lesser evil.
    return Tile(rows, rows // frames, 8 if rows > (32 if summing else 64) else 4)


def _common(query, key, value, added, scale, scale_bias_by_row_max, *, summing=False) -> tuple[dict, dict, Tile]:
    """Arguments and constants that both kernels share, and the tile."""
    batch, positions, heads, frames, dim = query.shape
    value_dim = value.shape[-1]
    tile = tile_of(frames, query.element_size(), summing=summing)
    arguments = {
        "query": query, "key": key, "value": value, "added": added,
        "positions": positions, "total": batch * positions, "heads": heads,
        "tiles": -(-batch * positions // tile.sequences), "scale": scale,
    }  # fmt: skip
    constants = {
        "FRAMES": frames, "DIM": dim, "DIM_PAD": padded(dim), "VALUE_DIM": value_dim, "VALUE_PAD": padded(value_dim),
        "ROWS": tile.rows, "SEQUENCES": tile.sequences, "HAS_ADDED": added is not None,
        "SCALE_BIAS_BY_ROW_MAX": scale_bias_by_row_max, "UPCAST": INTERPRETED and query.dtype != torch.float32,
    }  # fmt: skip
    for name in ("query", "key", "value"):
        add_strides(name, arguments[name], arguments, constants)
    return arguments, constants, tile


def add_strides(name: str, tensor: torch.Tensor | None, arguments: dict, constants: dict) -> None:
    """Adds the strides of a tensor `[B, P, H, F, D]`, in units where that tells the compiler what it cannot see
    itself.
    """
    if tensor is None or all(step % 16 == 0 for step in tensor.stride()[:-1]):
        steps, unit = strides(name, tensor, "bphfd"), {f"{name.upper()}_UNIT": 1}
    else:
        steps, unit = unit_strides(name, tensor, "bphfd")
    arguments.update(steps)
    constants.update(unit)


def forward_launch(query, key, value, added, scale, scale_bias_by_row_max, capture):
    """The launch of the forward pass and the tensors it fills: out, and maps or `None`.

    Args:
        query: `[B, P, H, F, D]`; the rest as in `cvg_kernels.reference.temporal_attention`.
        key: `[B, P, H, F, D]`.
        value: `[B, P, H, F, Dv]`.
        added: float32 `[F, F]` or `None`.
        scale: factor of the logits.
        scale_bias_by_row_max: multiply the rows of `added` by m.
        capture: make maps.
    """
    batch, positions, heads, frames, _ = query.shape
    out, maps = dense_like(query, value.shape[-1]), None
    if capture:
        maps = query.new_empty((batch, positions, frames, frames), dtype=torch.float32)
    arguments, constants, tile = _common(query, key, value, added, scale, scale_bias_by_row_max)
    arguments |= {"out": out, "maps": maps}
    add_strides("out", out, arguments, constants)
    constants["MAPS"] = capture
    grid = (arguments["tiles"] * (1 if capture else heads),)
    launch = Launch.matching(temporal_forward_kernel, grid, arguments, constants, tile.warps, 1)
    return launch, (out, maps)


def backward_launch(
    grad_out, grad_maps, query, key, value, added, scale, scale_bias_by_row_max, row_max_grad,
    need_query, need_key, need_value, need_added,
):  # fmt: skip
    """The launch of the backward pass and what it fills: three gradients, and sums for the fourth, or `None`s."""
    arguments, constants, tile = _common(query, key, value, added, scale, scale_bias_by_row_max, summing=need_added)
    needed = {"query": need_query, "key": need_key, "value": need_value}
    grads = {name: dense_like(arguments[name]) if need else None for name, need in needed.items()}
    programs, sums = arguments["tiles"] * arguments["heads"], None
    if need_added:
        programs = min(programs, _SUMMING_PROGRAMS)
        sums = query.new_empty((programs, tile.rows, tile.rows), dtype=torch.float32)
    if grad_out is not None and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()  # of a sum all strides are 0: no load would be of more than one number
    grad_maps = None if grad_maps is None else grad_maps.contiguous()
    arguments |= {"grad_out": grad_out, "grad_maps": grad_maps, "sums": sums}
    add_strides("grad", grad_out, arguments, constants)
    for name, grad in grads.items():
        arguments[f"grad_{name}"] = grad
        add_strides(f"to_{name}", grad, arguments, constants)
        constants[f"NEED_{name.upper()}"] = needed[name]
    constants |= {
        "ROW_MAX_GRAD": row_max_grad,
        "HAS_OUT": grad_out is not None,
        "MAPS": grad_maps is not None,
        "NEED_ADDED": need_added,
    }
    launch = Launch.matching(temporal_backward_kernel, (programs,), arguments, constants, tile.warps, 1)
    return launch, (*grads.values(), sums)


def forward(*call):
    """Returns out and maps (`None` without capture); see `cvg_kernels.reference.temporal_attention`."""
    launch, results = forward_launch(*call)
    launch.run()
    return results


def backward(*call):
    """Returns the gradients asked for; see `cvg_kernels.reference.temporal_attention`."""
    launch, (*grads, sums) = backward_launch(*call)
    launch.run()
    if sums is None:
        return (*grads, None)
    # Each sequence of a tile has its block on the diagonal.
    frames, sequences = launch.constants["FRAMES"], launch.constants["SEQUENCES"]
    total = sums.sum(0, dtype=torch.float64)
    starts = range(0, sequences * frames, frames)
    blocks = [total[first : first + frames, first : first + frames] for first in starts]
    return (*grads, torch.stack(blocks).sum(0).float())
