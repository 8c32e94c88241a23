"""Exact maximum flow: the public functions, their checks, their registration with torch, and their backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from cvg_kernels.backends import Backend
from cvg_kernels.errors import ArgumentError, is_whole
from cvg_kernels.kernels import Facts
from cvg_kernels.ops._choice import run_kernel
from cvg_kernels.ops._trace import note_backend, register_autograd
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate_given import described, holds_numbers, normalize_tensors
from cvg_kernels.reference import max_flow as reference

Residual = Literal["average", "add"]
Sink = Literal["video", "frame"]


class SubgraphFlow(NamedTuple):
    """What `subgraph_max_flow` returns.

    Attributes:
        flow: `[B, K, L]`, or `[B, K, F, L]` for single frames; the dtype of cross.
        cut: bool `[B, K, L, n + 1, F]`, or `[B, K, L, F, n + 1, F]`: on the token's side?
    """

    flow: torch.Tensor
    cut: torch.Tensor


class MaxFlow(NamedTuple):
    """What `max_flow` returns.

    Attributes:
        flow: `[G]`, the dtype of the capacities.
        source_side: bool `[G, n]`.
    """

    flow: torch.Tensor
    source_side: torch.Tensor


def subgraph_max_flow(
    cross: torch.Tensor,
    temporal: Sequence[torch.Tensor],
    *,
    residual: Residual | None = "average",
    sink: Sink = "video",
    backend: str | Backend = "auto",
) -> SubgraphFlow:
    """Maximum flow of each token to the video, or to each of its frames, at every position.

    The graph of token k at position l has a node (h, f) for frame f after h of the n hops:

        token —cross[b,k,f,l]→ (0, f),    (h, j) —residual_hop(T_h)[b,l,i,j]→ (h + 1, i)

    The flow is the capacity of the minimum cut, and its gradient is 1 on the edges of the cut (½ for hops whose
    residual is averaged) and 0 elsewhere. Where several cuts are minimal, the one with the fewest nodes on the token's
    side counts. All arithmetic is float64 inside, so float32 input is solved to the last bit of its result, as a rule.

    Args:
        cross: `[B, K, F, L]`, float32 or float64: attention of position L of frame F to token K. Any strides.
        temporal: n hops `[B, L, F, F]` (row = attending frame), first hop first; may be empty.
        residual: `"average"` is (A+I)/2, `"add"` is A+I, `None` is A.
        sink: `"video"`: all output frames (n, f) feed one sink, with capacity 1 each. `"frame"`: each output frame is
            the sink of a graph of its own; the other output frames lead nowhere and count to the token's side.
        backend: `"auto"`, `"reference"` (any size; slow), `"native"` (C++, CPU tensors) or `"cuda"` (GPU tensors). The
            kernels take up to 64 frames and 16 hops; beyond, `auto` is the reference.

    Returns:
        `SubgraphFlow(flow, cut)`: `cut` tells for each node (h, f) whether it is on the token's side of the cut. An
        edge is cut where its tail is and its head is not; the token always is, the sink never.

    Raises:
        ArgumentError: if an argument does not fit, or an entry is NaN, infinite or negative; names the entry. (On a
            GPU the check of the entries waits for the kernel.)
        BackendUnavailableError: if the named backend cannot run here.

    The maximum flow of "Compositional Video Generation as Flow Equalization" (Vico), which its code replaces by the
    widest path (`path_flow`, a lower bound).

    Examples:
        >>> cross = torch.tensor([0.25, 0.75]).view(1, 1, 2, 1)  # a word is seen in the second of two frames
        >>> hop = torch.tensor([[[[0.5, 0.5], [0.0, 0.125]]]])
        >>> cvg.subgraph_max_flow(cross, [hop], residual=None).flow
        tensor([[[0.8750]]])
    """
    check_capacities("cross", cross, "[B, K, F, L]", 4)
    batch, _, frames, positions = cross.shape
    if frames == 0:
        raise ArgumentError("cross must have at least one frame, got none")
    temporal = normalize_tensors("temporal", temporal)
    for number, hop in enumerate(temporal):
        name, shape = f"temporal[{number}]", (batch, positions, frames, frames)
        check_capacities(name, hop, "[B, L, F, F]", 4)
        if tuple(hop.shape) != shape:
            raise ArgumentError(f"{name} must have shape [B, L, F, F] = {shape}, got {tuple(hop.shape)}")
        if (hop.dtype, hop.device) != (cross.dtype, cross.device):
            raise ArgumentError(
                f"{name} must have the dtype and device of cross ({cross.dtype}, {cross.device}), got "
                f"{hop.dtype}, {hop.device}"
            )
    if residual not in ("average", "add", None):
        raise ArgumentError(f"residual must be 'average', 'add' or None, got {residual!r}")
    if sink not in ("video", "frame"):
        raise ArgumentError(f"sink must be 'video' or 'frame', got {sink!r}")
    backend = backend_under_transforms(
        "subgraph_max_flow", backend, (cross, *temporal), kernels=(), reference=("derivative",)
    )
    if backend is Backend.REFERENCE and holds_numbers(cross):
        note_backend("max_flow", "reference")
        check_entries(cross=cross, temporal=temporal)
        return SubgraphFlow(*reference.subgraph_max_flow(cross, temporal, residual=residual, sink=sink))
    return SubgraphFlow(*_subgraph_op(cross, temporal, residual, sink, backend.value))


def max_flow(capacity: torch.Tensor, source: int, sink: int, *, backend: str | Backend = "auto") -> MaxFlow:
    """Maximum flow from one node to another, and a minimum cut, of many small graphs at once.

        flow = min over S of Σ_{i ∈ S, j ∉ S} capacity[i, j],   source ∈ S, sink ∉ S

    The gradient is 1 on the edges of the minimum cut and 0 elsewhere. Where several cuts are minimal, the one with the
    fewest nodes on the source's side counts. Arithmetic is float64 inside; a flow beyond the largest number of the
    dtype is infinite.

    Args:
        capacity: `[G, n, n]`, float32 or float64, entry [i, j] of the edge from i to j; the diagonal plays no part.
            Any strides.
        source: a node in [0, n), the same in every graph.
        sink: another.
        backend: `"auto"`, `"reference"` (any size; slow), `"native"` (C++, CPU tensors) or `"cuda"` (GPU tensors). The
            kernels take up to 64 nodes; beyond, `auto` is the reference.

    Returns:
        `MaxFlow(flow, source_side)`: an edge is cut where its tail is on the source's side and its head is not.

    Raises:
        ArgumentError: if an argument does not fit, or an entry is NaN, infinite or negative; names the entry.
        BackendUnavailableError: if the named backend cannot run here.

    Examples:
        >>> capacity = torch.tensor([[[0.0, 2.0, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
        >>> cvg.max_flow(capacity, source=0, sink=2)
        MaxFlow(flow=tensor([1.5000]), source_side=tensor([[ True,  True, False]]))
    """
    check_capacities("capacity", capacity, "[G, n, n]", 3)
    nodes = capacity.shape[1]
    if capacity.shape[2] != nodes or nodes < 2:
        raise ArgumentError(f"capacity must be square [G, n, n] with n ≥ 2, got {tuple(capacity.shape)}")
    for name, node in (("source", source), ("sink", sink)):
        if not is_whole(node, 0) or node >= nodes:
            raise ArgumentError(f"{name} must be a node in [0, {nodes}), got {node!r}")
    if source == sink:
        raise ArgumentError(f"source and sink must differ, got {source} for both")
    backend = backend_under_transforms("max_flow", backend, (capacity,), reference=("derivative",))
    if backend is Backend.REFERENCE and holds_numbers(capacity):
        note_backend("max_flow", "reference")
        check_entries(capacity=capacity)
        return MaxFlow(*reference.max_flow(capacity, source, sink))
    return MaxFlow(*_graphs_op(capacity, source, sink, backend.value))


# --- checks ----------------------------------------------------------------------------------------------------------


def check_capacities(name: str, tensor: torch.Tensor, shape: str, dimensions: int) -> None:
    """Checks that an argument is a tensor that capacities can stand in, with so many axes."""
    fits = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
    if not fits or tensor.ndim != dimensions or tensor.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"{name} must be float32 or float64 {shape}, got {described(tensor)}")


def check_entries(**arguments: torch.Tensor | Sequence[torch.Tensor]) -> None:
    """Raises for the first entry that is no capacity."""
    for argument, given in arguments.items():
        named = (
            {argument: given}
            if isinstance(given, torch.Tensor)
            else {f"{argument}[{number}]": tensor for number, tensor in enumerate(given)}
        )
        for name, tensor in named.items():
            wrong = ~((tensor >= 0) & (tensor < torch.inf))
            if wrong.any():
                index = tuple(wrong.nonzero()[0].tolist())
                place = ", ".join(map(str, index))
                raise ArgumentError(f"{name} must hold finite capacities ≥ 0, got {tensor[index].item()} at [{place}]")


# --- registration ----------------------------------------------------------------------------------------------------

torch.library.define(
    "cvg_kernels::subgraph_max_flow",
    "(Tensor cross, Tensor[] temporal, str? residual, str sink, str backend) -> (Tensor flow, Tensor cut)",
)
torch.library.define(
    "cvg_kernels::subgraph_max_flow_backward",
    "(Tensor grad_flow, Tensor cut, str? residual, str sink, bool need_cross, bool[] need_temporal, str backend) -> "
    "(Tensor grad_cross, Tensor[] grad_temporal)",
)
torch.library.define(
    "cvg_kernels::max_flow",
    "(Tensor capacity, SymInt source, SymInt sink, str backend) -> (Tensor flow, Tensor source_side)",
)
torch.library.define("cvg_kernels::max_flow_backward", "(Tensor grad_flow, Tensor source_side) -> Tensor")

_subgraph_op = torch.ops.cvg_kernels.subgraph_max_flow.default
_subgraph_backward_op = torch.ops.cvg_kernels.subgraph_max_flow_backward.default
_graphs_op = torch.ops.cvg_kernels.max_flow.default
_graphs_backward_op = torch.ops.cvg_kernels.max_flow_backward.default


@torch.library.impl("cvg_kernels::subgraph_max_flow", "default")
def _subgraph_forward(cross, temporal, residual, sink, backend):
    flow, cut, good = run_kernel(
        "max_flow",
        backend,
        Facts(cross.device, cross.dtype, frames=cross.shape[2], hops=len(temporal)),
        lambda module: module.subgraph_forward(cross, temporal, residual, sink),
    )
    if not good:
        check_entries(cross=cross, temporal=temporal)
    return flow, cut


@torch.library.register_fake("cvg_kernels::subgraph_max_flow")
def _subgraph_fake(cross, temporal, residual, sink, backend):
    batch, tokens, frames, positions = cross.shape
    nodes = (len(temporal) + 1, frames)
    if sink == "frame":
        flow, cut = (batch, tokens, frames, positions), (batch, tokens, positions, frames, *nodes)
    else:
        flow, cut = (batch, tokens, positions), (batch, tokens, positions, *nodes)
    return cross.new_empty(flow), cross.new_empty(cut, dtype=torch.bool)


@torch.library.impl("cvg_kernels::subgraph_max_flow_backward", "default")
def _subgraph_backward(grad_flow, cut, residual, sink, need_cross, need_temporal, backend):
    cross, temporal = run_kernel(
        "max_flow_backward",
        backend,
        Facts(cut.device, grad_flow.dtype, frames=cut.shape[-1], hops=cut.shape[-2] - 1),
        lambda module: module.subgraph_backward(grad_flow, cut, residual, sink, need_cross, need_temporal),
    )

    def result(grad):  # `None` cannot be returned by an operation
        return grad_flow.new_empty(0) if grad is None else grad

    return result(cross), list(map(result, temporal))


@torch.library.register_fake("cvg_kernels::subgraph_max_flow_backward")
def _subgraph_backward_fake(grad_flow, cut, residual, sink, need_cross, need_temporal, backend):
    batch, tokens, positions, frames = *cut.shape[:3], cut.shape[-1]
    shape = (batch, positions, frames, frames)
    return (
        grad_flow.new_empty((batch, tokens, frames, positions) if need_cross else (0,)),
        [grad_flow.new_empty(shape if need else (0,)) for need in need_temporal],
    )


@torch.library.impl("cvg_kernels::max_flow", "default")
def _graphs_forward(capacity, source, sink, backend):
    flow, side, good = run_kernel(
        "max_flow",
        backend,
        Facts(capacity.device, capacity.dtype, frames=capacity.shape[1]),
        lambda module: module.forward(capacity, source, sink),
    )
    if not good:
        check_entries(capacity=capacity)
    return flow, side


@torch.library.register_fake("cvg_kernels::max_flow")
def _graphs_fake(capacity, source, sink, backend):
    graphs, nodes, _ = capacity.shape
    return capacity.new_empty(graphs), capacity.new_empty((graphs, nodes), dtype=torch.bool)


@torch.library.impl("cvg_kernels::max_flow_backward", "default")
def _graphs_backward(grad_flow, source_side):
    cut = source_side[:, :, None] & ~source_side[:, None, :]
    return torch.where(cut, grad_flow[:, None, None], 0)


@torch.library.register_fake("cvg_kernels::max_flow_backward")
def _graphs_backward_fake(grad_flow, source_side):
    graphs, nodes = source_side.shape
    return grad_flow.new_empty((graphs, nodes, nodes))


def _remember_subgraph(ctx, inputs, output) -> None:
    _, temporal, *ctx.options = inputs
    ctx.hops = len(temporal)
    ctx.save_for_backward(output[1])


def _differentiate_subgraph(ctx, grad_flow, _):
    (cut,) = ctx.saved_tensors
    residual, sink, backend = ctx.options
    need_cross, need_temporal = ctx.needs_input_grad[:2]
    cross, temporal = _subgraph_backward_op(grad_flow, cut, residual, sink, need_cross, list(need_temporal), backend)
    temporal = [hop if need else None for hop, need in zip(temporal, need_temporal, strict=True)]
    return cross if need_cross else None, temporal, None, None, None


def _remember_graphs(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])


def _differentiate_graphs(ctx, grad_flow, _):
    return _graphs_backward_op(grad_flow, *ctx.saved_tensors), None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "maximum flow has no second derivative in its kernels; call it with backend='reference', which is plain "
        "PyTorch and can be differentiated twice (the result is 0 wherever it exists)"
    )


for _name, _differentiate, _remember in (
    ("subgraph_max_flow", _differentiate_subgraph, _remember_subgraph),
    ("max_flow", _differentiate_graphs, _remember_graphs),
):
    register_autograd(f"cvg_kernels::{_name}", _differentiate, setup_context=_remember)
    torch.library.register_autograd(f"cvg_kernels::{_name}_backward", _no_second_derivative)
