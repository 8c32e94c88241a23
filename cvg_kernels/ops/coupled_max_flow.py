"""Exact maximum flow through all positions at once:
the public function, its checks, and its registration with torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from cvg_kernels.backends import Backend
from cvg_kernels.errors import ArgumentError
from cvg_kernels.kernels import Facts
from cvg_kernels.ops._choice import run_kernel
from cvg_kernels.ops._trace import register_autograd
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate_given import normalize_tensors
from cvg_kernels.ops.max_flow import check_capacities, check_entries
from cvg_kernels.reference import path_flow as path_reference


class CoupledFlow(NamedTuple):
    """What `coupled_max_flow` returns.

    Attributes:
        flow: `[B, K]`, the dtype of cross.
        cut: bool `[B, K, layers, F, L]`: on the token's side?
    """

    flow: torch.Tensor
    cut: torch.Tensor


def coupled_max_flow(
    cross: torch.Tensor,
    temporal: Sequence[torch.Tensor],
    spatial: torch.Tensor | None = None,
    *,
    residual: Literal["average", "add"] | None = "average",
    backend: str | Backend = "auto",
) -> CoupledFlow:
    """Maximum flow of each token to the whole video, through attention within frames and among them.

    The graph of token k has a node (h, f, l) for position l of frame f after h hops:

        token —cross[b,k,f,l]→ (0, f, l),   (0, f, j) —S'[b,f,i,j]→ (1, f, i),   (h, j, l) —T'[b,l,i,j]→ (h + 1, i, l),
        (last, f, l) —1→ sink

    with S' and T' the hops with their skip connection. The flow is the capacity of the minimum cut, its gradient 1 on
    the edges of that cut (½ for averaged hops); of several minimal cuts the one with the fewest nodes on the token's
    side.

    One graph has F · L² + hops · L · F² edges: 16 384 for 8 frames of 8×8 positions, 0.5 million for 16 frames of
    10×16, and 105 million for 16 frames of 40×64, where it no longer fits. A backward pass costs next to nothing.

    Args:
        cross: `[B, K, F, L]`, float32 or float64.
        temporal: hops `[B, L, F, F]` (row = attending frame), first hop first; may be empty.
        spatial: S `[B, F, L, L]` (row = attending position), or `None`: then the positions do not meet, and the flow
            is the sum over positions of `subgraph_max_flow(…, sink="video")`.
        residual: `"average"` is (A+I)/2, `"add"` is A+I, `None` is A.
        backend: `"auto"`, `"native"` (C++, CPU tensors) or `"reference"`.

    Returns:
        `CoupledFlow(flow, cut)`; the flow of a token is at most F · L.

    Raises:
        ArgumentError: if an argument does not fit, or a capacity is NaN, infinite or negative.
        BackendUnavailableError: if the named backend cannot run here.

    ST-Flow of "Compositional Video Generation as Flow Equalization" (Vico), without the paper's restriction to paths.

    Examples:
        >>> cross = torch.full((1, 1, 2, 4), 0.5)
        >>> hop = torch.eye(2).expand(1, 4, 2, 2)
        >>> cvg.coupled_max_flow(cross, [hop]).flow
        tensor([[4.]])
    """
    check_capacities("cross", cross, "[B, K, F, L]", 4)
    temporal = normalize_tensors("temporal", temporal)
    if residual not in ("average", "add", None):
        raise ArgumentError(f"residual must be 'average', 'add' or None, got {residual!r}")
    batch, _, frames, positions = cross.shape
    wanted = {f"temporal[{n}]": (hop, (batch, positions, frames, frames)) for n, hop in enumerate(temporal)}
    if spatial is not None:
        check_capacities("spatial", spatial, "[B, F, L, L]", 4)
        wanted["spatial"] = (spatial, (batch, frames, positions, positions))
    for name, (hop, shape) in wanted.items():
        if tuple(hop.shape) != shape or hop.dtype != cross.dtype or hop.device != cross.device:
            raise ArgumentError(
                f"{name} must be {cross.dtype} {shape} on {cross.device}, got {hop.dtype} {tuple(hop.shape)} on "
                f"{hop.device}"
            )
    backend = backend_under_transforms(
        "coupled_max_flow", backend, (cross, spatial, *temporal), kernels=(), reference=()
    )
    hops = [path_reference.residual_hop(hop.double(), residual) for hop in temporal]
    inside = None if spatial is None else path_reference.residual_hop(spatial.double(), residual)
    flow, cut = _forward_op(cross.double(), inside, hops, backend.value)
    return CoupledFlow(flow.to(cross.dtype), cut)


# --- registration ----------------------------------------------------------------------------------------------------
# Everything is float64 here, and the hops have their skip connections.

torch.library.define(
    "cvg_kernels::coupled_max_flow",
    "(Tensor cross, Tensor? spatial, Tensor[] temporal, str backend) -> (Tensor flow, Tensor cut)",
)
_forward_op = torch.ops.cvg_kernels.coupled_max_flow.default


@torch.library.impl("cvg_kernels::coupled_max_flow", ("cpu", "cuda"))
def _forward(cross, spatial, temporal, backend):
    flow, cut, good = run_kernel(
        "coupled_max_flow",
        backend,
        Facts(cross.device, cross.dtype),
        lambda module: module.forward(cross, spatial, temporal),
    )
    if not good:
        given = {"cross": cross, "temporal": temporal}
        check_entries(**given, **({} if spatial is None else {"spatial": spatial}))
    return flow, cut


@torch.library.register_fake("cvg_kernels::coupled_max_flow")
def _forward_fake(cross, spatial, temporal, backend):
    batch, tokens, frames, positions = cross.shape
    layers = 1 + (spatial is not None) + len(temporal)
    cut = cross.new_empty((batch, tokens, layers, frames, positions), dtype=torch.bool)
    return cross.new_empty((batch, tokens)), cut


def _remember(ctx, inputs, output) -> None:
    _, cut = output
    ctx.mark_non_differentiable(cut)
    ctx.save_for_backward(cut)
    ctx.has_spatial = inputs[1] is not None


def _differentiate(ctx, grad, _):
    """The indicator of the cut on each edge, summed over the tokens whose graphs share it."""
    (cut,) = ctx.saved_tensors
    near, far = cut.to(grad.dtype), (~cut).to(grad.dtype)  # [B, K, layers, F, L]
    near = near * grad[:, :, None, None, None]
    grad_cross = grad[:, :, None, None] * far[:, :, 0]
    first, grad_spatial = 0, None
    if ctx.has_spatial:
        first = 1
        grad_spatial = torch.einsum("bkfi,bkfj->bfij", far[:, :, 1], near[:, :, 0])
    grad_temporal = [
        torch.einsum("bkil,bkjl->blij", far[:, :, h + 1], near[:, :, h]) for h in range(first, cut.shape[2] - 1)
    ]
    return grad_cross, grad_spatial, grad_temporal, None


register_autograd("cvg_kernels::coupled_max_flow", _differentiate, setup_context=_remember)
