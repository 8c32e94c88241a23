"""Launchers of maps between the frames of a video: they allocate, share out tiles as temporal attention does, and
launch.

Per place and head, of F frames and element size s: 2 · F · D · s bytes read and, with a head mean, 4 · F² / H written,
at 2 · F² · D operations; backward 2 · F · D · s more written and three products more. At 21 frames, head_dim 128 and
12 heads that is 10.5 operations a byte in 16 bits: a pass of bytes, of 1 / (h · w) of the main attention's products.
"""

from __future__ import annotations

import torch

from cvg_kernels._triton.launch import INTERPRETED, Launch, padded, strides
from cvg_kernels._triton.temporal_attention import Tile, add_strides, tile_of
from cvg_kernels._triton.temporal_maps_kernels import maps_backward_kernel, maps_forward_kernel
from cvg_kernels.ops._temporal_maps_call import MapsCall, Targets


def _common(call: MapsCall) -> tuple[dict, dict, Tile]:
    """Arguments and constants that both kernels share, and the tile."""
    batch, places, heads, frames, dim = call.query.shape
    tile = tile_of(frames, call.query.element_size())
    arguments = {
        "query": call.query, "key": call.key, "lse": call.lse, "key_bias": call.key_bias,
        "places": places, "total": batch * places, "heads": heads, "scale": call.scale,
        "tiles": -(-batch * places // tile.sequences),
        **strides("lse", call.lse, "bphf"), **strides("key_bias", call.key_bias, "bpf"),
    }  # fmt: skip
    constants = {
        "FRAMES": frames, "DIM": dim, "DIM_PAD": padded(dim), "ROWS": tile.rows, "SEQUENCES": tile.sequences,
        "HAS_LSE": call.lse is not None, "HAS_KEY_BIAS": call.key_bias is not None, "HEAD_MEAN": call.head_mean,
        "UPCAST": INTERPRETED and call.query.dtype != torch.float32,
    }  # fmt: skip
    for name in ("query", "key"):
        add_strides(name, arguments[name], arguments, constants)
    return arguments, constants, tile


def forward_launch(call: MapsCall) -> tuple[Launch, torch.Tensor]:
    """The launch of the forward pass, and the maps that it fills."""
    maps = call.query.new_empty(call.maps_shape, dtype=torch.float32)
    arguments, constants, tile = _common(call)
    arguments["maps"] = maps
    grid = (arguments["tiles"] * (1 if call.head_mean else arguments["heads"]),)
    return Launch.matching(maps_forward_kernel, grid, arguments, constants, tile.warps, 1), maps


def backward_launch(call: MapsCall, grad_maps: torch.Tensor, targets: Targets) -> Launch:
    """The launch that fills the gradients that are wanted."""
    arguments, constants, tile = _common(call)
    arguments |= {"grad_maps": grad_maps.contiguous(), **strides("to_lse", targets.lse, "bphf")}
    for name, target in targets._asdict().items():
        arguments[f"grad_{name}"] = target
        constants[f"NEED_{name.upper()}"] = target is not None
    for name in ("query", "key"):
        add_strides(f"to_{name}", arguments[f"grad_{name}"], arguments, constants)
    grid = (arguments["tiles"] * arguments["heads"],)
    return Launch.matching(maps_backward_kernel, grid, arguments, constants, tile.warps, 1)


def forward(call: MapsCall) -> torch.Tensor:
    """Returns the maps; see `cvg_kernels.reference.temporal_maps`."""
    launch, maps = forward_launch(call)
    launch.run()
    return maps


def backward(call: MapsCall, grad_maps: torch.Tensor, targets: Targets) -> None:
    """Fills the gradients that are wanted; see `cvg_kernels.reference.temporal_maps`."""
    backward_launch(call, grad_maps, targets).run()
