"""Launchers of attention with capture: they allocate, choose tiles by a table, and launch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from cvg_kernels._triton.attention_backward import delta_kernel, key_kernel, query_kernel
from cvg_kernels._triton.attention_forward import capture_kernel, forward_kernel
from cvg_kernels._triton.launch import INTERPRETED, Launch, padded, strides

#: Captured tokens that a program holds at once.
_MAX_TOKENS = 64
#: Keys up to which attention is bound by memory traffic, so that capture pays inside the forward kernel.
_SHORT_KEYS = 1024


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a score tile, and how many warps and pipeline stages work on it."""

    rows: int
    columns: int
    warps: int
    stages: int


def forward_tile(head_dim: int, element_size: int) -> Tile:
    """The tile of the forward kernel: as large as registers allow without spilling."""
    if element_size == 4:  # float32 is multiplied without tensor cores
        return Tile(16, 32, 8, 1) if head_dim > 64 else Tile(32, 32, 8, 1)
    if head_dim > 128:
        return Tile(64, 32, 8, 1)
    return Tile(128, 64, 8, 2) if head_dim > 64 else Tile(128, 64, 4, 3)


def backward_tile(head_dim: int, element_size: int) -> Tile:
    """The tile of the backward kernels, which hold more at once."""
    if element_size == 4:
        return Tile(32, 16, 8, 1) if head_dim > 64 else Tile(32, 32, 4, 1)
    if head_dim > 128:
        return Tile(32, 32, 8, 1)
    return Tile(64, 64, 8, 1) if head_dim > 64 else Tile(64, 64, 4, 2)


def fuse_capture(
    batch: int, queries: int, keys: int, tokens: int, rows: int, processors: int
) -> bool:
    """Whether one program takes a query tile through all heads, maps included.

    Args:
        batch: samples.
        queries: rows of a sample.
        keys: keys of a sample.
        tokens: captured tokens.
        rows: rows of a tile.
        processors: multiprocessors of the GPU.
    """
    programs = batch * -(-queries // rows)
    return tokens <= _MAX_TOKENS and keys <= _SHORT_KEYS and 2 * programs >= 3 * processors


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _common(query, key, value, token_ids, bias, scale) -> tuple[dict, dict]:
    """Arguments and constants that all kernels share."""
    batch, heads, queries, dim = query.shape
    value_dim = dim if value is None else value.shape[3]
    arguments = {
        "query": query, "key": key, "token_ids": token_ids, "bias": bias,
        **strides("query", query), **strides("key", key),
        "heads": heads, "queries": queries, "keys": key.shape[2], "tokens": token_ids.shape[1], "scale": scale,
    }  # fmt: skip
    constants = {
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "VALUE_DIM": value_dim,
        "VALUE_PAD": padded(value_dim),
        "TOKENS_PAD": min(_MAX_TOKENS, padded(token_ids.shape[1])),
        "HAS_BIAS": bias is not None,
        "UPCAST": INTERPRETED and query.dtype != torch.float32,
    }
    return arguments, constants


def _launch(kernel, grid, arguments, constants, tile: Tile) -> Launch:
    """A launch with just those arguments and constants that the kernel names."""
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, **constants}
    return Launch.matching(kernel, grid, arguments, constants, tile.warps, tile.stages)


def forward_launches(query, key, value, token_ids, bias, scale, head_mean, *, processors=None):
    """The launches of the forward pass and the tensors they fill: out (`None` without values), maps, lse.

    Args:
        query: `[B, H, N, D]`; the rest as in `python_ref.attention`.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]` or `None`.
        token_ids: int64 `[B, K]`.
        bias: float32 `[B, M]` or `None`.
        scale: factor of the logits.
        head_mean: average the maps over the heads.
        processors: multiprocessors to plan for; `None` asks the device.
    """
    batch, heads, queries, dim = query.shape
    tokens = token_ids.shape[1]
    out = None if value is None else query.new_empty(batch, heads, queries, value.shape[3])
    maps_shape = (batch, tokens, queries) if head_mean else (batch, heads, tokens, queries)
    maps = query.new_empty(maps_shape, dtype=torch.float32)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)

    arguments, constants = _common(query, key, value, token_ids, bias, scale)
    tile = forward_tile(max(dim, constants["VALUE_DIM"]), query.element_size())
    if processors is None:
        processors = 1 if INTERPRETED else _processors(query.device)
    all_heads = head_mean and fuse_capture(
        batch, queries, key.shape[2], tokens, tile.rows, processors
    )
    if all_heads:  # the maps take registers too: more warps share them
        tile = replace(tile, warps=8)
    capture = all_heads or (not head_mean and tokens <= _MAX_TOKENS)
    arguments |= {"value": value, "out": out, "maps": maps, "lse": lse, **strides("value", value)}
    constants |= {"HAS_VALUE": value is not None, "ALL_HEADS": all_heads, "CAPTURE": capture}
    tiles = -(-queries // tile.rows)
    entries = batch if all_heads else batch * heads
    launches = [_launch(forward_kernel, (tiles * entries,), arguments, constants, tile)]
    if not capture:
        constants["ALL_HEADS"] = head_mean
        entries = batch if head_mean else batch * heads
        grid = (tiles * entries, -(-tokens // constants["TOKENS_PAD"]))
        launches.append(_launch(capture_kernel, grid, arguments, constants, tile))
    return launches, (out, maps, lse)


def backward_launches(
    grad_out, grad_maps, grad_lse, query, key, value, token_ids, bias, out, lse, scale, head_mean,
    need_query, need_key, need_value,
):  # fmt: skip
    """The launches of the backward pass and the gradients they fill, `None` where not needed."""
    batch, heads, queries, dim = query.shape

    def result(tensor, needed):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None

    grads = result(query, need_query), result(key, need_key), result(value, need_value)
    arguments, constants = _common(query, key, value, token_ids, bias, scale)
    arguments |= {
        "value": value, "out": out, "lse": lse, "grad_out": grad_out, "delta": torch.empty_like(lse),
        "grad_maps": None if grad_maps is None else grad_maps.contiguous(),
        "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
        "grad_query": grads[0], "grad_key": grads[1], "grad_value": grads[2],
        **strides("value", value), **strides("grad", grad_out),
        **strides("out", None if grad_out is None else out),
    }  # fmt: skip
    constants |= {
        "HAS_OUT": grad_out is not None,
        "HAS_MAPS": grad_maps is not None,
        "HAS_LSE": grad_lse is not None,
        "HEAD_MEAN": head_mean,
        "NEED_KEY": need_key,
        "NEED_VALUE": need_value,
    }
    tile = backward_tile(max(dim, constants["VALUE_DIM"]), query.element_size())
    entries = batch * heads
    row_tiles, key_tiles = -(-queries // tile.rows), -(-key.shape[2] // tile.columns)
    launches = [_launch(delta_kernel, (row_tiles * entries,), arguments, constants, tile)]
    if need_query:
        launches.append(_launch(query_kernel, (row_tiles * entries,), arguments, constants, tile))
    if need_key or need_value:
        launches.append(_launch(key_kernel, (key_tiles * entries,), arguments, constants, tile))
    return launches, grads


def forward(query, key, value, token_ids, bias, scale, head_mean):
    """Returns out (`None` without values), maps and lse; see `python_ref.attention`."""
    launches, outputs = forward_launches(query, key, value, token_ids, bias, scale, head_mean)
    for launch in launches:
        launch.run()
    return outputs


def backward(*call):
    """Returns the gradients asked for; see `python_ref.attention`."""
    launches, grads = backward_launches(*call)
    for launch in launches:
        launch.run()
    return grads
