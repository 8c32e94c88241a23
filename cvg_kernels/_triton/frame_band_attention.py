"""Launchers of attention with a band by frame distance: they allocate, choose tiles by a table, and launch."""

from __future__ import annotations

from dataclasses import replace

import torch

from cvg_kernels._layout import dense_like
from cvg_kernels._triton.attention import Tile, backward_tile, forward_tile
from cvg_kernels._triton.frame_band_attention_kernels import (
    frame_band_forward_kernel,
    frame_band_key_kernel,
    frame_band_row_kernel,
)
from cvg_kernels._triton.launch import INTERPRETED, Launch, padded, strides

_LOG2E = 1.4426950408889634


def tiles_of(head_dim: int, element_size: int) -> tuple[Tile, Tile, Tile]:
    """Tiles of the forward, row and key kernels.

    Those of plain attention, but smaller where the band would make a kernel spill, or where the compiler for AMD's GPUs
    fails on its two passes.
    """
    forward, row = forward_tile(head_dim, element_size), backward_tile(head_dim, element_size)
    key = row
    if element_size == 4:
        if head_dim > 64:
            row = replace(row, rows=16)
    elif head_dim <= 64:
        forward = replace(forward, stages=2)
    elif head_dim <= 128:
        forward, key = replace(forward, columns=32), replace(key, columns=32)
    return forward, row, key


def _common(
    query, key, value, query_frames, key_frames, scale, sigma, strength
) -> tuple[dict, dict]:
    """Arguments and constants that all kernels share."""
    dim, value_dim = query.shape[3], value.shape[3]
    arguments = {
        "query": query, "key": key, "value": value, "query_frames": query_frames, "key_frames": key_frames,
        **strides("query", query), **strides("key", key), **strides("value", value),
        "heads": query.shape[1], "queries": query.shape[2], "keys": key.shape[2],
        "scale": scale, "falloff2": -0.5 * _LOG2E / sigma**2, "strength": strength,
    }  # fmt: skip
    constants = {
        "DIM": dim, "DIM_PAD": padded(dim), "VALUE_DIM": value_dim, "VALUE_PAD": padded(value_dim),
        "UPCAST": INTERPRETED and query.dtype != torch.float32,
    }  # fmt: skip
    return arguments, constants


def _launch(kernel, programs: int, arguments, constants, tile: Tile) -> Launch:
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, **constants}
    return Launch.matching(kernel, (programs,), arguments, constants, tile.warps, tile.stages)


def forward_launch(query, key, value, query_frames, key_frames, scale, sigma, strength):
    """The launch of the forward pass and the tensors it fills: out, lse, m and its place.

    Args:
        query: `[B, H, N, D]`; the rest as in `python_ref.frame_band_attention`.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        query_frames: int32 `[N]`.
        key_frames: int32 `[M]`.
        scale: factor of the logits.
        sigma: width of the band.
        strength: factor of the band.
    """
    batch, heads, queries, dim = query.shape
    out = dense_like(query, value.shape[3])
    lse, highest = (query.new_empty((batch, heads, queries), dtype=torch.float32) for _ in range(2))
    place = query.new_empty((batch, heads, queries), dtype=torch.int32)
    arguments, constants = _common(
        query, key, value, query_frames, key_frames, scale, sigma, strength
    )
    arguments |= {"out": out, "lse": lse, "highest": highest, "place": place, **strides("out", out)}
    tile, _, _ = tiles_of(max(dim, value.shape[3]), query.element_size())
    programs = -(-queries // tile.rows) * batch * heads
    launch = _launch(frame_band_forward_kernel, programs, arguments, constants, tile)
    return launch, (out, lse, highest, place)


def backward_launches(
    grad_out, grad_lse, query, key, value, query_frames, key_frames, out, lse, highest, place,
    scale, sigma, strength, row_max_grad, need_query, need_key, need_value,
):  # fmt: skip
    """The launches of the backward pass and the gradients they fill, `None` where not needed."""
    batch, heads, queries, dim = query.shape
    needed = {"query": need_query, "key": need_key, "value": need_value}
    grads = {
        name: dense_like(tensor) if needed[name] else None
        for name, tensor in {"query": query, "key": key, "value": value}.items()
    }
    arguments, constants = _common(
        query, key, value, query_frames, key_frames, scale, sigma, strength
    )
    arguments |= {
        "out": out, "lse": lse, "highest": highest, "place": place, "grad_out": grad_out,
        "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
        "delta": torch.empty_like(lse), "through_max": torch.empty_like(lse),
        **strides("out", out), **strides("grad", grad_out),
    }  # fmt: skip
    constants |= {
        "HAS_OUT": grad_out is not None,
        "HAS_LSE": grad_lse is not None,
        "ROW_MAX_GRAD": row_max_grad,
    }
    for name, grad in grads.items():
        arguments |= {f"grad_{name}": grad, **strides(f"to_{name}", grad)}
        constants[f"NEED_{name.upper()}"] = needed[name]
    _, row_tile, key_tile = tiles_of(max(dim, value.shape[3]), query.element_size())
    entries = batch * heads
    programs = -(-queries // row_tile.rows) * entries
    launches = [_launch(frame_band_row_kernel, programs, arguments, constants, row_tile)]
    if need_key or need_value:
        programs = -(-key.shape[2] // key_tile.columns) * entries
        launches.append(_launch(frame_band_key_kernel, programs, arguments, constants, key_tile))
    return launches, tuple(grads.values())


def forward(*call):
    """Returns out, lse, the maximum of each row and its place; see `python_ref.frame_band_attention`."""
    launch, results = forward_launch(*call)
    launch.run()
    return results


def backward(*call):
    """Returns the gradients asked for; see `python_ref.frame_band_attention`."""
    launches, grads = backward_launches(*call)
    for launch in launches:
        launch.run()
    return grads
