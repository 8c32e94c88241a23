"""Autocast, as torch's own attention knows it: inputs are cast, and inside nothing is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def cast_inputs(query, key, value):
    """Query, key and value in autocast's dtype where autocast is on; float64 stays, as torch has it."""
    if not isinstance(query, torch.Tensor):
        return query, key, value
    device_type = query.device.type
    if not (
        torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    ):
        return query, key, value
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return cast(query), cast(key), cast(value)


def autocast_off(device: torch.device) -> AbstractContextManager:
    """No autocast inside: what is written as float32 is computed in float32."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
