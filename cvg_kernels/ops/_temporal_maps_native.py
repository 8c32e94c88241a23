"""Maps between frames by the C++ kernels: allocates the result and passes addresses."""

from __future__ import annotations

from functools import partial

import torch

from cvg_kernels import native
from cvg_kernels.ops._native_call import DTYPE_CODES, strided, threads
from cvg_kernels.ops._temporal_maps_call import MapsCall, Targets

_strided5 = partial(strided, rank=5)


def forward(call: MapsCall) -> torch.Tensor:
    """Returns the maps; see `cvg_kernels.reference.temporal_maps`."""
    wide = torch.promote_types(call.query.dtype, torch.float32)
    maps = call.query.new_empty(call.maps_shape, dtype=wide)
    native.load("cpu").temporal_maps(*_arguments(call), maps.data_ptr())
    return maps


def backward(call: MapsCall, grad_maps: torch.Tensor, targets: Targets) -> None:
    """Fills the gradients that are wanted; see `cvg_kernels.reference.temporal_maps`."""
    grad_maps = grad_maps.contiguous()
    native.load("cpu").temporal_maps_backward(
        *_arguments(call), grad_maps.data_ptr(), _strided5(targets.query), _strided5(targets.key), strided(targets.lse)
    )


def _arguments(call: MapsCall) -> tuple:
    """The arguments that both passes begin with."""
    query = call.query
    return (
        tuple(query.shape),
        DTYPE_CODES[query.dtype],
        _strided5(query),
        _strided5(call.key),
        strided(call.lse),
        strided(call.key_bias),
        call.scale,
        call.head_mean,
        threads(),
    )
