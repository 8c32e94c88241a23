"""Launchers of the forward pass of attention and of the capture of maps: they allocate, plan and launch."""

from __future__ import annotations

import math

import torch

from cvg_kernels._layout import dense_like
from cvg_kernels._triton.attention_arguments import MAX_TOKENS, add_tensor, common, tiled_launch
from cvg_kernels._triton.attention_few_keys_kernel import few_keys_kernel
from cvg_kernels._triton.attention_forward_kernels import add_maps_kernel, capture_kernel, forward_kernel
from cvg_kernels._triton.attention_tiles import (
    Tile,
    capture_inside,
    few_keys_tile,
    forward_tile,
    heads_of_a_program,
    is_hopper,
    processors_of,
)
from cvg_kernels._triton.launch import INTERPRETED, Launch
from cvg_kernels.ops._attention_call import AttentionCall, AttentionResult

_ADDED_AT_ONCE = 1024


def forward_launches(
    call: AttentionCall, *, processors: int | None = None, hopper: bool | None = None
) -> tuple[list[Launch], AttentionResult]:
    """The launches of the forward pass, and the tensors they fill.

    Args:
        call: the arguments.
        processors: multiprocessors to plan for; `None` asks the device.
        hopper: whether to plan for Hopper's products and shared memory; `None` asks the device.
    """
    processors, hopper = _machine(call, processors, hopper)
    batch, heads, queries, dim = call.query.shape
    keys = call.key.shape[2]
    tokens = 0 if call.token_ids is None else call.token_ids.shape[1]
    value_dim = dim if call.value is None else call.value.shape[3]
    wide, element_size = max(dim, value_dim), call.query.element_size()
    few = None
    if call.band is None and call.token_bias is None:  # what these add would make it spill
        few = few_keys_tile(keys, wide, element_size, hopper=hopper)
    fused = 0 < tokens <= MAX_TOKENS and (
        few is not None or heads == 1 or not call.head_mean or capture_inside(tokens, keys, dim)
    )
    tile = few or forward_tile(wide, element_size, hopper=hopper, band=call.band is not None, capture=fused)

    result = _empty_result(call)
    arguments, constants = common(call)
    arguments |= {
        "lse": result.lse, "row_max": result.row_max, "row_argmax": result.row_argmax, "batch": batch,
        "factor": abs(call.scale) or 1.0, "turn": math.copysign(1.0, call.scale) if call.scale else 0.0,
    }  # fmt: skip
    add_tensor(arguments, constants, "out", result.out)
    tiles = -(-queries // tile.rows)
    heads_each = 1
    if few and (call.head_mean or tokens == 0):
        heads_each = heads_of_a_program(tiles * batch, heads, processors)
    groups = -(-heads // heads_each)
    parts, additions = _parts(call, result.maps, groups if fused else 1)
    arguments |= {"heads_each": heads_each, "maps": parts}
    last = keys - (tile.columns if tile.rest else 0)
    constants |= {
        "REST": tile.rest, "STAGES": tile.stages, "PEELED": tile.peeled, "TURNED": not call.scale > 0,
        "CAPTURE": fused, "TAIL": last % (tile.rest or tile.columns) != 0,
    }  # fmt: skip
    kernel = few_keys_kernel if few else forward_kernel
    launches = [tiled_launch(kernel, (tiles * batch * groups,), arguments, constants, tile)]
    if tokens and not fused:
        launches += _capture(call, arguments, constants, result.maps, processors)
    return [*launches, *additions], result


def capture_launches(
    call: AttentionCall, lse: torch.Tensor, *, processors: int | None = None
) -> tuple[list[Launch], torch.Tensor]:
    """The launches that make the maps of a call without a band from its log-sum-exp, and the maps.

    Args:
        call: the arguments; its values are not looked at.
        lse: wide, contiguous `[B, H, N]`.
        processors: multiprocessors to plan for; `None` asks the device.
    """
    processors, _ = _machine(call, processors, False)
    arguments, constants = common(call)
    arguments |= {"lse": lse, "row_max": None, "batch": call.query.shape[0]}
    maps = _empty_maps(call)
    return _capture(call, arguments, constants, maps, processors), maps


def _machine(call, processors: int | None, hopper: bool | None) -> tuple[int, bool]:
    """Multiprocessors, and whether they are Hopper's, as given or as the device says."""
    if INTERPRETED:
        return processors or 1, bool(hopper)
    if processors is None:
        processors = processors_of(call.query.device)
    if hopper is None:
        hopper = call.query.device.type == "cuda" and is_hopper(call.query.device)
    return processors, hopper


def _empty_maps(call: AttentionCall) -> torch.Tensor | None:
    if call.token_ids is None:
        return None
    batch, heads, queries, _ = call.query.shape
    tokens = call.token_ids.shape[1]
    shape = (batch, tokens, queries) if call.head_mean else (batch, heads, tokens, queries)
    return call.query.new_empty(shape, dtype=torch.float32)


def _empty_result(call: AttentionCall) -> AttentionResult:
    rows = call.query.shape[:3]
    lse = call.query.new_empty(rows, dtype=torch.float32)
    out = None if call.value is None else dense_like(call.query, call.value.shape[3])
    if call.band is None:
        return AttentionResult(out, _empty_maps(call), lse)
    row_argmax = lse.new_empty(rows, dtype=torch.int32)
    return AttentionResult(out, _empty_maps(call), lse, torch.empty_like(lse), row_argmax)


def _parts(call: AttentionCall, maps: torch.Tensor | None, groups: int):
    """Where programs write maps: the maps themselves, or the shares of groups of heads and a launch that adds them."""
    if maps is None or groups == 1 or not call.head_mean:
        return maps, []
    parts = maps.new_empty(groups, *maps.shape)
    arguments = {"parts": parts, "maps": maps, "count": groups, "numbers": maps.numel()}
    grid = (-(-maps.numel() // _ADDED_AT_ONCE),)
    return parts, [Launch(add_maps_kernel, grid, arguments, {"BLOCK": _ADDED_AT_ONCE}, 4, 1)]


def _capture(call, arguments: dict, constants: dict, maps: torch.Tensor, processors: int) -> list[Launch]:
    """The launches that fill `maps` from `lse`, given the arguments of a forward pass or of none."""
    batch, heads, queries, dim = call.query.shape
    blocks = -(-call.token_ids.shape[1] // constants["TOKENS_PAD"])
    tile = Tile(64, constants["TOKENS_PAD"], 4, 2)
    if call.query.element_size() == 4:
        tile = Tile(32, constants["TOKENS_PAD"], 4, 1)
    tiles = -(-queries // tile.rows)
    heads_each = 1
    if call.head_mean:
        heads_each = heads_of_a_program(tiles * batch * blocks, heads, processors)
    groups = -(-heads // heads_each)
    parts, additions = _parts(call, maps, groups)
    arguments = {**arguments, "heads_each": heads_each, "maps": parts}
    constants = {**constants, "STAGES": tile.stages}
    grid = (tiles * batch * groups, blocks)
    return [tiled_launch(capture_kernel, grid, arguments, constants, tile), *additions]


def forward(call: AttentionCall) -> AttentionResult:
    """Out, maps and lse of a call, and under a band m and its place; see `cvg_kernels.ops._attention_call`."""
    launches, result = forward_launches(call)
    for launch in launches:
        launch.run()
    return result


def capture(call: AttentionCall, lse: torch.Tensor) -> torch.Tensor:
    """The maps of a call whose log-sum-exp is known; under a band its row maxima are found anew."""
    if call.band is not None:
        return forward(call._replace(value=None)).maps
    launches, maps = capture_launches(call, lse)
    for launch in launches:
        launch.run()
    return maps
