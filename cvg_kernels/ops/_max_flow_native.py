"""Exact maximum flow by the C++ kernels, on the CPU or an NVIDIA GPU: allocates the results and passes addresses."""

from __future__ import annotations

import torch

from cvg_kernels import native
from cvg_kernels.ops._native_call import address, strided, threads

#: residual → (scale, skip): the capacity of a hop is scale · (T + skip · I).
_MIXING = {"average": (0.5, 1.0), "add": (1.0, 1.0), None: (1.0, 0.0)}


def subgraph_forward(cross, temporal, residual, sink):
    """Returns flow, cut and whether all input was capacities; see `cvg_kernels.reference.max_flow`."""
    batch, tokens, frames, positions = cross.shape
    every_frame = sink == "frame"
    flow_shape = (batch, tokens, frames, positions) if every_frame else (batch, tokens, positions)
    sinks = (frames,) if every_frame else ()
    flow = cross.new_empty(flow_shape)
    cut_shape = (batch, tokens, positions, *sinks, len(temporal) + 1, frames)
    cut = cross.new_empty(cut_shape, dtype=torch.bool)
    bad = torch.zeros((), dtype=torch.int32, device=cross.device)
    _solve(
        "subgraph_max_flow",
        cross,
        cross.shape,
        cross.dtype == torch.float64,
        every_frame,
        *_MIXING[residual],
        strided(cross),
        [strided(hop) for hop in temporal],
        flow.data_ptr(),
        cut.data_ptr(),
        bad.data_ptr(),
    )
    return flow, cut, not bad


def subgraph_backward(grad_flow, cut, residual, sink, need_cross, need_temporal):
    """Returns the gradients asked for, the others `None`."""
    batch, tokens, positions, frames = *cut.shape[:3], cut.shape[-1]
    grad_flow = grad_flow.contiguous()
    cross = grad_flow.new_empty(batch, tokens, frames, positions) if need_cross else None
    shape = (batch, positions, frames, frames)
    temporal = [grad_flow.new_empty(shape) if need else None for need in need_temporal]
    given = (
        (batch, tokens, frames, positions),
        grad_flow.dtype == torch.float64,
        sink == "frame",
        _MIXING[residual][0],
        grad_flow.data_ptr(),
        cut.data_ptr(),
        address(cross),
        [address(hop) for hop in temporal],
    )
    if cut.is_cuda:
        with torch.cuda.device(cut.device):
            native.load("cuda").subgraph_max_flow_backward(*given, _stream())
    else:
        native.load("cpu").subgraph_max_flow_backward(*given, threads())
    return cross, temporal


def forward(capacity, source, sink):
    """Returns flow, source's side and whether all input was capacities."""
    graphs, nodes, _ = capacity.shape
    flow = capacity.new_empty(graphs)
    side = capacity.new_empty(graphs, nodes, dtype=torch.bool)
    bad = torch.zeros((), dtype=torch.int32, device=capacity.device)
    _solve(
        "max_flow",
        capacity,
        graphs,
        nodes,
        source,
        sink,
        capacity.dtype == torch.float64,
        *strided(capacity, rank=3),
        flow.data_ptr(),
        side.data_ptr(),
        bad.data_ptr(),
    )
    return flow, side, not bad


def _solve(name: str, tensor: torch.Tensor, *given) -> None:
    """Calls a solver where the tensor is. On a GPU it asks for the device memory that it needs."""
    if not tensor.is_cuda:
        getattr(native.load("cpu"), name)(*given, threads())
        return
    scratch = []  # held until the kernel is in the stream, which orders what is allocated after it

    def allocate(size: int) -> int:
        scratch.append(tensor.new_empty(size, dtype=torch.uint8))
        return scratch[0].data_ptr()

    with torch.cuda.device(tensor.device):
        getattr(native.load("cuda"), name)(*given, allocate, _stream())


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
