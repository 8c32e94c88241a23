"""Autocast, as torch's own attention knows it: inputs are cast, and inside nothing is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def cast_inputs(query, key, value):
    """Query, key and value in autocast's dtype where autocast is on; float64 stays, as torch has it."""
    if not isinstance(query, torch.Tensor) or not autocast_is_on(query.device.type):
        return query, key, value
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return cast(query), cast(key), cast(value)


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast casts on devices of a type; it knows not all of them."""
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type)


def autocast_off(device: torch.device) -> AbstractContextManager:
    """No autocast inside: what is written as float32 is computed in float32."""
    if autocast_is_on(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
