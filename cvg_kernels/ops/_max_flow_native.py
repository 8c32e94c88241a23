"""Exact maximum flow by the C++ kernels, on the CPU or a GPU: allocates the results and passes addresses."""

from __future__ import annotations

import torch

from cvg_kernels import native

#: residual → (scale, skip): the capacity of a hop is scale · (T + skip · I).
_MIXING = {"average": (0.5, 1.0), "add": (1.0, 1.0), None: (1.0, 0.0)}


def _strided(tensor: torch.Tensor):
    return tensor.data_ptr(), tensor.stride()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _target(tensor: torch.Tensor) -> str:
    return "cuda" if tensor.is_cuda else "cpu"


def _how(tensor: torch.Tensor) -> int:
    """What a kernel runs on: a stream on a GPU, a number of threads on a CPU."""
    if tensor.is_cuda:
        return torch.cuda.current_stream(tensor.device).cuda_stream
    return torch.get_num_threads()


def subgraph_forward(cross, temporal, residual, sink):
    """Returns flow, cut and whether all input was capacities; see `python_ref.max_flow`."""
    batch, tokens, frames, positions = cross.shape
    every_frame = sink == "frame"
    flow_shape = (batch, tokens, frames, positions) if every_frame else (batch, tokens, positions)
    sinks = (frames,) if every_frame else ()
    flow = cross.new_empty(flow_shape)
    cut_shape = (batch, tokens, positions, *sinks, len(temporal) + 1, frames)
    cut = cross.new_empty(cut_shape, dtype=torch.bool)
    bad = torch.zeros((), dtype=torch.int32, device=cross.device)
    native.load(_target(cross)).subgraph_max_flow(
        cross.shape, cross.dtype == torch.float64, every_frame, *_MIXING[residual],
        _strided(cross), [_strided(hop) for hop in temporal],
        flow.data_ptr(), cut.data_ptr(), bad.data_ptr(), _how(cross),
    )  # fmt: skip
    return flow, cut, not bad


def subgraph_backward(grad_flow, cut, residual, sink, need_cross, need_temporal):
    """Returns the gradients asked for, the others `None`."""
    batch, tokens, positions, frames = *cut.shape[:3], cut.shape[-1]
    grad_flow = grad_flow.contiguous()
    cross = grad_flow.new_empty(batch, tokens, frames, positions) if need_cross else None
    shape = (batch, positions, frames, frames)
    temporal = [grad_flow.new_empty(shape) if need else None for need in need_temporal]
    native.load(_target(cut)).subgraph_max_flow_backward(
        (batch, tokens, frames, positions), grad_flow.dtype == torch.float64, sink == "frame",
        _MIXING[residual][0], grad_flow.data_ptr(), cut.data_ptr(),
        _address(cross), [_address(hop) for hop in temporal], _how(cut),
    )  # fmt: skip
    return cross, temporal


def forward(capacity, source, sink):
    """Returns flow, source's side and whether all input was capacities."""
    graphs, nodes, _ = capacity.shape
    flow = capacity.new_empty(graphs)
    side = capacity.new_empty(graphs, nodes, dtype=torch.bool)
    bad = torch.zeros((), dtype=torch.int32, device=capacity.device)
    native.load(_target(capacity)).max_flow(
        graphs, nodes, source, sink, capacity.dtype == torch.float64, *_strided(capacity),
        flow.data_ptr(), side.data_ptr(), bad.data_ptr(), _how(capacity),
    )  # fmt: skip
    return flow, side, not bad
