"""Temporal attention by the CUDA kernels: allocates the results and passes addresses."""

from __future__ import annotations

import torch

from cvg_kernels import native
from cvg_kernels.ops._layout import dense_like

_ABSENT = (0, (0, 0, 0, 0, 0))


def _strided(tensor: torch.Tensor | None):
    return _ABSENT if tensor is None else (tensor.data_ptr(), tensor.stride())


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _call(query, key, value, added, scale, by_row_max) -> tuple:
    """The arguments that both passes begin with."""
    return (
        (*query.shape, value.shape[-1]), query.dtype == torch.bfloat16,
        _strided(query), _strided(key), _strided(value), _address(added), scale, by_row_max,
    )  # fmt: skip


def _launch(name: str, device: torch.device, *given) -> None:
    """Puts a kernel into the current stream of a device."""
    with torch.cuda.device(device):
        getattr(native.load("cuda"), name)(*given, torch.cuda.current_stream().cuda_stream)


def forward(query, key, value, added, scale, by_row_max, capture):
    """Returns out and maps (`None` without capture); see `python_ref.temporal_attention`."""
    batch, positions, _, frames, _ = query.shape
    out, maps = dense_like(query, value.shape[-1]), None
    if capture:
        maps = query.new_empty((batch, positions, frames, frames), dtype=torch.float32)
    _launch(
        "temporal_attention_forward", query.device,
        *_call(query, key, value, added, scale, by_row_max), _strided(out), _address(maps),
    )  # fmt: skip
    return out, maps


def backward(
    grad_out, grad_maps, query, key, value, added, scale, by_row_max, row_max_grad,
    need_query, need_key, need_value, need_added,
):  # fmt: skip
    """Returns the gradients asked for; see `python_ref.temporal_attention`."""
    grad_maps = None if grad_maps is None else grad_maps.contiguous()
    needed = (need_query, need_key, need_value)
    grads = [
        dense_like(tensor) if need else None
        for tensor, need in zip((query, key, value), needed, strict=True)
    ]
    frames = query.shape[-2]
    shares = query.new_empty((0, frames, frames), dtype=torch.float32)

    def allocate(count: int) -> int:
        nonlocal shares
        shares = query.new_empty((count, frames, frames), dtype=torch.float32)
        return shares.data_ptr()

    _launch(
        "temporal_attention_backward", query.device,
        *_call(query, key, value, added, scale, by_row_max),
        _strided(grad_out), _address(grad_maps), row_max_grad,
        *(_strided(grad) for grad in grads), allocate if need_added else None,
    )  # fmt: skip
    # Summed in an order of its own, the same each time, and in float64.
    grad_added = shares.sum(0, dtype=torch.float64).float() if need_added else None
    return (*grads, grad_added)
