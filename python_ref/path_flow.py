"""Min-max path flow: how much of a token reaches each frame along its widest path. The definition.

A path through layers carries as much as its narrowest edge; the flow of a token is that of its widest path, and the
product that finds it is the matrix product with (×, +) replaced by (min, max):

    (A ⊙ B)_ij = max_r min(A_ir, B_rj)

The soft form replaces max and min by  max_T(x) = T log Σ exp(x/T)  and  min_T(x) = −max_T(−x).  After h hops over R
nodes each it differs from the hard form by at most  T · h · (ln R + ln 2).  A product of equal edges x comes out as
x + T (ln R − ln 2), and the correction of the bias subtracts that after each.

The hard product is associative, the soft one is not: a soft flow through several hops depends on what is multiplied
first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch


def soft_bias(temperature: float | None, nodes: int) -> float:
    """T (ln R − ln 2): what the soft product over R nodes adds to edges that are all equal; 0 for the hard one."""
    return 0.0 if temperature is None else temperature * math.log(nodes / 2)


def min_max_matmul(
    a: torch.Tensor, b: torch.Tensor, temperature: float | None = None, correct_bias: bool = False
) -> torch.Tensor:
    """(A ⊙ B)_ij = max_r min(A_ir, B_rj).

    Args:
        a: `[..., X, R]`.
        b: `[..., R, Y]`.
        temperature: `None` for the hard form, T > 0 for the soft one.
        correct_bias: subtract `soft_bias`.

    Returns:
        `[..., X, Y]`.
    """
    left, right = a[..., :, :, None], b[..., None, :, :]  # [..., X, R, 1], [..., 1, R, Y]
    if temperature is None:
        return torch.minimum(left, right).amax(-2)
    # logaddexp and logsumexp subtract a running maximum, so no T overflows.
    narrow = -torch.logaddexp(-left / temperature, -right / temperature)
    flow = temperature * narrow.logsumexp(-2)
    return flow - soft_bias(temperature, a.shape[-1]) if correct_bias else flow


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
