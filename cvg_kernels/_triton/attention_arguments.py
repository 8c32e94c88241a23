"""What the attention kernels are told of a call, forward and backward: tensors, strides, sizes and constants."""

from __future__ import annotations

import torch

from cvg_kernels._triton.attention_tiles import Tile
from cvg_kernels._triton.launch import INTERPRETED, Launch, padded, strides, unit_strides
from cvg_kernels.ops._attention_call import AttentionCall

#: Captured tokens that a program holds at once.
MAX_TOKENS = 64
_LOG2E = 1.4426950408889634


def common(call: AttentionCall) -> tuple[dict, dict]:
    """Arguments and constants that all kernels share; a launch takes those that its kernel names.

    Beside the tensors of the call, their strides (`unit_strides`) and sizes there are

    * `loop_bias [B, M]`, for loops over keys, with `HAS_LOOP_BIAS`: the key bias, but −∞ at keys with a token bias,
      which a kernel takes one by one, outside its loop;
    * `log2_repeats [B, K]`, with `HAS_TOKEN_BIAS`: log₂ of how often a token's key occurs among the sample's tokens.
      What sums over tokens subtracts it from the logit, base 2, so that the occurrences share the key.
    """
    query, key, value = call.query, call.key, call.value
    heads, queries, dim = query.shape[1:]
    value_dim = dim if value is None else value.shape[3]
    tokens = 0 if call.token_ids is None else call.token_ids.shape[1]
    loop_bias, log2_repeats = call.key_bias, None
    if call.token_bias is not None:
        loop_bias, log2_repeats = _apart(call)
    arguments = {
        "query": query, "key": key, "value": value, "token_ids": call.token_ids,
        "key_bias": call.key_bias, "loop_bias": loop_bias,
        "token_bias": call.token_bias, "log2_repeats": log2_repeats, **strides("token_bias", call.token_bias, "bkn"),
        "heads": heads, "queries": queries, "keys": key.shape[2], "tokens": tokens, "scale": call.scale,
    }  # fmt: skip
    constants = {
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "VALUE_DIM": value_dim,
        "VALUE_PAD": padded(value_dim),
        "TOKENS_PAD": min(MAX_TOKENS, padded(tokens)),
        "HAS_VALUE": value is not None,
        "HAS_KEY_BIAS": call.key_bias is not None,
        "HAS_LOOP_BIAS": loop_bias is not None,
        "HAS_TOKEN_BIAS": call.token_bias is not None,
        "HEAD_MEAN": call.head_mean,
        "BAND": call.band is not None,
        "UPCAST": INTERPRETED and query.dtype != torch.float32,
    }
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        add_tensor(arguments, constants, name, tensor)
    band = call.band
    arguments |= {
        "query_frames": None if band is None else band.query_frames,
        "key_frames": None if band is None else band.key_frames,
        "falloff2": 0.0 if band is None else -0.5 * _LOG2E / band.sigma**2,
        "strength": 0.0 if band is None else band.strength,
    }  # fmt: skip
    constants["ROW_MAX_GRAD"] = band is not None and band.row_max_grad
    return arguments, constants


def _apart(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The key bias with −∞ at the keys that have a token bias, and log₂ of how often each of these occurs."""
    ids, like = call.token_ids, call.token_bias
    batch, keys = call.query.shape[0], call.key.shape[2]
    bias = like.new_zeros(batch, keys) if call.key_bias is None else call.key_bias
    repeats = like.new_zeros(batch, keys).scatter_add_(1, ids, like.new_ones(()).expand(ids.shape))
    return bias.masked_fill(repeats > 0, float("-inf")), repeats.gather(1, ids).log2()


def add_tensor(
    arguments: dict, constants: dict, name: str, tensor: torch.Tensor | None, as_name: str | None = None
) -> None:  # fmt: skip
    """Adds a tensor `[B, H, N, D]` to the arguments, with its strides and their unit.

    Args:
        arguments: arguments of the launch, changed in place.
        constants: constants of the launch, changed in place.
        name: the kernel's name of the tensor.
        tensor: the tensor, or `None`.
        as_name: the stem of its strides' names, if it is not `name`.
    """
    steps, unit = unit_strides(as_name or name, tensor)
    arguments |= {name: tensor, **steps}
    constants |= unit


def tiled_launch(kernel, grid, arguments: dict, constants: dict, tile: Tile) -> Launch:
    """A launch with just those arguments and constants that the kernel names."""
    constants = {**constants, "ROWS": tile.rows, "COLUMNS": tile.columns}
    return Launch.matching(kernel, grid, arguments, constants, tile.warps, tile.stages)
