"""Exact maximum flow of each token through all positions of a video at once. The definition.

With attention among the positions of a frame the small graphs of `max_flow` grow together into one:

    token —cross[b,k,f,l]→ (0, f, l),   (0, f, j) —S[b,f,i,j]→ (1, f, i),   (h, j, l) —T[b,l,i,j]→ (h + 1, i, l),
    (last, f, l) —1→ sink

with hops that have their skip connections mixed in. The flow is the capacity of the minimum cut, its gradient 1 on the
edges of that cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from cvg_kernels.reference.max_flow import source_side


def coupled_max_flow(
    cross: torch.Tensor, spatial: torch.Tensor | None, temporal: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow `[B, K]` and the token's side of the minimum cut, bool `[B, K, layers, F, L]`.

    Args:
        cross: `[B, K, F, L]`.
        spatial: `[B, F, L, L]`, row = attending position, or `None`.
        temporal: hops `[B, L, F, F]`, row = attending frame, first hop first.
    """
    batch, tokens, frames, positions = cross.shape
    layers = 1 + (spatial is not None) + len(temporal)
    size = frames * positions
    flow = cross.new_zeros(batch, tokens)
    side = torch.zeros(batch, tokens, layers, frames, positions, dtype=torch.bool)
    for b, k in itertools.product(range(batch), range(tokens)):
        capacity = cross.new_zeros(layers * size + 2, layers * size + 2, dtype=torch.float64)
        layer = capacity[:-2, :-2].view(layers, frames, positions, layers, frames, positions)
        source, sink = layers * size, layers * size + 1
        capacity[source, :size] = cross[b, k].flatten()
        if spatial is not None:
            for f in range(frames):
                layer[0, f, :, 1, f] = spatial[b, f].mT
        first = int(spatial is not None)
        for h, hop in enumerate(temporal, start=first):
            for place in range(positions):
                layer[h, :, place, h + 1, :, place] = hop[b, place].mT
        capacity[source - size : source, sink] = 1.0
        reached = torch.tensor(source_side(capacity.tolist(), source, sink))
        flow[b, k] = capacity[reached][:, ~reached].sum()
        side[b, k] = reached[:source].view(layers, frames, positions)
    return flow, side.to(cross.device)
