"""Maximum flow through all positions by the reference, as a backend; as `_coupled_max_flow_native`."""

from __future__ import annotations

from cvg_kernels.ops._max_flow_reference import are_capacities
from cvg_kernels.reference import coupled_max_flow as reference


def forward(cross, spatial, temporal):
    """Returns flow, cut and whether all input was capacities."""
    hops = temporal if spatial is None else [spatial, *temporal]
    if not are_capacities(cross, *hops):
        return None, None, False
    return *reference.coupled_max_flow(cross, spatial, temporal), True
