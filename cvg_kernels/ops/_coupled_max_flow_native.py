"""Maximum flow through all positions by the C++ kernel: allocates the results and passes addresses."""

from __future__ import annotations

import torch

from cvg_kernels import native
from cvg_kernels.ops._native_call import address, threads


def forward(cross, spatial, temporal):
    """Returns flow, cut and whether all input was capacities; all float64, the hops with their skip connections."""
    batch, tokens, frames, positions = cross.shape
    layers = 1 + (spatial is not None) + len(temporal)
    flow = cross.new_empty(batch, tokens)
    cut = cross.new_empty(batch, tokens, layers, frames, positions, dtype=torch.bool)
    cross, hops = cross.contiguous(), [hop.contiguous() for hop in temporal]
    spatial = None if spatial is None else spatial.contiguous()
    good = native.load("cpu").coupled_max_flow(
        (batch, tokens, frames, positions),
        cross.data_ptr(),
        address(spatial),
        [hop.data_ptr() for hop in hops],
        threads(),
        flow.data_ptr(),
        cut.data_ptr(),
    )
    return flow, cut, good
