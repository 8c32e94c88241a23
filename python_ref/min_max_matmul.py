"""The min-max product: the matrix product with (×, +) replaced by (min, max). The definition.

    (A ⊙ B)_ij = max_r min(A_ir, B_rj)

The soft form replaces max and min by  max_T(x) = T log Σ exp(x/T)  and  min_T(x) = −max_T(−x).  Over R nodes it
differs from the hard form by at most  T (ln R + ln 2).  A product of equal edges x comes out as  x + T (ln R − ln 2),
and the correction of the bias subtracts that.

The hard product is associative, the soft one is not.
"""

from __future__ import annotations

import math

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
