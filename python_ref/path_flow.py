"""Min-max path flow: how much of a token reaches each frame along its widest path. The definition.

A path through layers carries as much as its narrowest edge; the flow of a token is that of its widest path, and the
product that finds it is the min-max product of `cvg_kernels.reference.min_max_matmul`, which also has the soft form.
After h hops over R nodes each, the soft flow differs from the hard one by at most  T · h · (ln R + ln 2).

A soft flow through several hops depends on what is multiplied first: the soft product is not associative.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from cvg_kernels.reference.min_max_matmul import min_max_matmul


def residual_hop(hop: torch.Tensor, residual: str | None) -> torch.Tensor:
    """Mixes the skip connection into a square hop: (A+I)/2 `"average"`, A+I `"add"`, or A `None`."""
    if residual is None:
        return hop
    mixed = hop + torch.eye(hop.shape[-1], dtype=hop.dtype, device=hop.device)
    return mixed / 2 if residual == "average" else mixed


def path_flow(
    cross: torch.Tensor,
    temporal: Sequence[torch.Tensor],
    *,
    temperature: float | None = None,
    residual: str | None = "average",
    spatial: torch.Tensor | None = None,
    correct_bias: bool = False,
    order: str = "tokens_first",
) -> torch.Tensor:
    """Flow of each token to each output frame, at each position: T_n ⊙ … ⊙ T_1 ⊙ (S ⊙) X.

    Args:
        cross: X `[B, K, F, L]`, the share of token K in the attention of position L of frame F.
        temporal: hops `[B, L, F, F]` in the order in which the network applies them, row = attending frame.
        temperature: `None` for the hard form, T > 0 for the soft one.
        residual: how the skip connection enters a hop: `"average"`, `"add"` or `None`.
        spatial: S `[B, F, L, L]`, attention among the positions of a frame, row = attending position: a hop before the
            temporal ones.
        correct_bias: correct the bias of every soft product.
        order: `"tokens_first"`, T_n ⊙ (… ⊙ (T_1 ⊙ X)), or `"hops_first"`, (T_n ⊙ (… ⊙ T_1)) ⊙ X.

    Returns:
        `[B, K, F, L]`.
    """

    def through(flow: torch.Tensor, hop: torch.Tensor) -> torch.Tensor:
        return min_max_matmul(hop, flow, temperature, correct_bias)

    if spatial is not None:
        flow = through(cross.permute(0, 2, 3, 1), residual_hop(spatial, residual))
        cross = flow.permute(0, 3, 1, 2)  # [B, F, L, K] -> [B, K, F, L]
    flow = cross.permute(0, 3, 2, 1)  # [B, L, F, K]
    hops = [residual_hop(hop, residual) for hop in temporal]
    if order == "hops_first" and hops:
        hops = [reduce(through, hops)]
    return reduce(through, hops, flow).permute(0, 3, 2, 1)
