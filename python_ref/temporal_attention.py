"""Temporal attention with a regularised band: the definition.

    S  = scale · q kᵀ                            over the frames of one position
    S' = S + added                               or, for the band of VSTAR,
    S' = S + m · added,   m_i = max_j S_ij
    P  = softmax(S'),   out = P v,   maps = mean of P over the heads

`added` is one [F, F] matrix for all positions and heads; VSTAR's is strength · exp(−(i − j)² / 2σ²). Where several
keys tie for the row's maximum, the gradient of m goes to the first of them. A row whose every logit is −∞ has P = 0.
"""

from __future__ import annotations

import torch

#: exp(−40² / 2) is 0 in float64 already; beyond, σ gets no gradient instead of 0 · ∞.
_FAR = 40.0


def gaussian_band(frames: int, sigma: torch.Tensor) -> torch.Tensor:
    """G_ij = exp(−(i − j)² / 2σ²), `[F, F]`, in the dtype of `sigma`, a 0-d tensor above 0."""
    frame = torch.arange(frames, dtype=sigma.dtype, device=sigma.device)
    distance = (frame[:, None] - frame[None, :]).abs() / sigma
    return (-0.5 * distance.clamp(max=_FAR).square()).exp()


def _probabilities(query, key, added, scale, scale_bias_by_row_max, row_max_grad):
    """P `[..., F, F]`, and m `[..., F]` with its first place, both `None` where it is not used."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scale * (query.to(wide) @ key.to(wide).mT)  # S [..., F, F]
    row_max = row_argmax = None
    if scale_bias_by_row_max:
        row_max, row_argmax = scores.max(-1)
        factor = row_max if row_max_grad else row_max.detach()
        scores = scores + factor[..., None] * added.to(wide)
    elif added is not None:
        scores = scores + added.to(wide)
    # A masked row is replaced before the softmax, not after, so that no NaN reaches its gradient.
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(unseen, 0.0).softmax(-1).masked_fill(unseen, 0.0)
    return weights, row_max, row_argmax


def temporal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    added: torch.Tensor | None,
    *,
    scale: float,
    scale_bias_by_row_max: bool,
    row_max_grad: bool = True,
    capture: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention among the frames of every position.

    Args:
        query: `[..., H, F, D]`.
        key: `[..., H, F, D]`.
        value: `[..., H, F, Dv]`.
        added: `[F, F]`, added to the logits, or `None`.
        scale: factor of the logits.
        scale_bias_by_row_max: multiply row i of `added` by m_i.
        row_max_grad: whether a gradient flows through m.
        capture: return the maps.

    Returns:
        out `[..., H, F, Dv]` in the query's dtype, and maps `[..., F, F]` in float32 (float64 for float64) or `None`.
    """
    weights, _, _ = _probabilities(query, key, added, scale, scale_bias_by_row_max, row_max_grad)
    out = (weights @ value.to(weights.dtype)).to(query.dtype)
    return out, weights.mean(-3) if capture else None


def temporal_attention_backward(
    grad_out: torch.Tensor | None,
    grad_maps: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    added: torch.Tensor | None,
    *,
    scale: float,
    scale_bias_by_row_max: bool,
    row_max_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradient in closed form, what every kernel computes.

        dP_ij  = dO_i · V_j + dC_ij / H
        dS'_ij = P_ij (dP_ij − Σ_l P_il dP_il)
        dS_ij  = dS'_ij + [j = argmax_l S_il] · Σ_l added_il dS'_il        the second term with m and its gradient only
        dq = scale · dS k,   dk = scale · dSᵀ q,   dv = Pᵀ dO,   dadded_ij = Σ m_i dS'_ij,  or Σ dS'_ij

    Args:
        grad_out: dO `[..., H, F, Dv]` or `None` for zero.
        grad_maps: dC `[..., F, F]` or `None` for zero.
        query: as in the forward pass, and so are the rest.
        key: `[..., H, F, D]`.
        value: `[..., H, F, Dv]`.
        added: `[F, F]` or `None`.
        scale: factor of the logits.
        scale_bias_by_row_max: multiply row i of `added` by m_i.
        row_max_grad: whether a gradient flows through m.

    Returns:
        The gradients of query, key, value and added (`None` without it), each in the dtype of its tensor.
    """
    weights, row_max, row_argmax = _probabilities(query, key, added, scale, scale_bias_by_row_max, row_max_grad)
    wide = weights.dtype
    grad_weights = torch.zeros_like(weights)  # dP
    grad_value = torch.zeros_like(value)
    if grad_out is not None:
        grad_weights = grad_out.to(wide) @ value.to(wide).mT
        grad_value = (weights.mT @ grad_out.to(wide)).to(value.dtype)
    if grad_maps is not None:
        grad_weights = grad_weights + grad_maps.unsqueeze(-3).to(wide) / query.shape[-3]
    delta = (weights * grad_weights).sum(-1, keepdim=True)
    grad_scores = weights * (grad_weights - delta)  # dS'
    grad_added = None
    if added is not None:
        terms = grad_scores * row_max[..., None] if scale_bias_by_row_max else grad_scores
        grad_added = terms.flatten(0, -3).sum(0).to(added.dtype)
    if scale_bias_by_row_max and row_max_grad:
        through_max = (added.to(wide) * grad_scores).sum(-1, keepdim=True)
        grad_scores = grad_scores.scatter_add(-1, row_argmax[..., None], through_max)
    grad_query = (scale * grad_scores @ key.to(wide)).to(query.dtype)
    grad_key = (scale * grad_scores.mT @ query.to(wide)).to(key.dtype)
    return grad_query, grad_key, grad_value, grad_added
