"""Attention over all tokens of a video with a band by frame distance: the definition.

    S    = scale · q kᵀ                          over all tokens of all frames
    G_ij = exp(−(f_i − f_j)² / 2σ²)              f: the frame of a token; 0 where either belongs to none (f = −1)
    S'   = S + strength · m · G,   m_i = max_j S_ij
    P    = softmax(S'),   out = P v,   lse_i = log Σ_j exp(S'_ij)

VSTAR's regularisation of temporal attention, carried over to networks that attend in space and time at once. Where
several keys tie for the row's maximum, the gradient of m goes to the first of them. Everything here holds the N×M matrix,
can be differentiated twice, and is written to be read.
"""

from __future__ import annotations

import torch


def frame_band(
    query_frames: torch.Tensor, key_frames: torch.Tensor, sigma: float, dtype: torch.dtype
) -> torch.Tensor:
    """G `[N, M]`.

    Args:
        query_frames: integers `[N]`, −1 for a token of no frame.
        key_frames: integers `[M]`.
        sigma: width in frames, above 0.
        dtype: of the result.
    """
    distance = (query_frames[:, None] - key_frames[None, :]).to(dtype) / sigma
    inside = (query_frames[:, None] >= 0) & (key_frames[None, :] >= 0)
    return (-0.5 * distance.square()).exp() * inside


def _probabilities(query, key, band, scale, row_max_grad):
    """P `[B, H, N, M]`, lse `[B, H, N]`, m `[B, H, N]` and its first place."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scale * (query.to(wide) @ key.to(wide).mT)  # S [B, H, N, M]
    highest, place = scores.max(-1)
    factor = highest if row_max_grad else highest.detach()
    scores = scores + factor[..., None] * band
    return scores.softmax(-1), scores.logsumexp(-1), highest, place


def frame_band_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_frames: torch.Tensor,
    key_frames: torch.Tensor,
    *,
    scale: float,
    sigma: float,
    strength: float,
    row_max_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention with the band.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        query_frames: integers `[N]`, −1 for a token of no frame.
        key_frames: integers `[M]`.
        scale: factor of the logits.
        sigma: width of the band in frames, above 0.
        strength: factor of the band.
        row_max_grad: whether a gradient flows through m.

    Returns:
        out `[B, H, N, Dv]` in the query's dtype; lse and m `[B, H, N]` in float32 (float64 for float64); and the place of
        m among the keys, int64 `[B, H, N]`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    band = strength * frame_band(query_frames, key_frames, sigma, wide)
    weights, lse, highest, place = _probabilities(query, key, band, scale, row_max_grad)
    return (weights @ value.to(wide)).to(query.dtype), lse, highest, place


def frame_band_attention_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_frames: torch.Tensor,
    key_frames: torch.Tensor,
    *,
    scale: float,
    sigma: float,
    strength: float,
    row_max_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient in closed form, what every kernel computes.

        dP_ij  = dO_i · V_j
        dS'_ij = P_ij (dP_ij − δ_i),   δ_i = Σ_l P_il dP_il − dlse_i
        dS_ij  = dS'_ij + [j = argmax_l S_il] · Σ_l strength · G_il dS'_il       the second term with m's gradient only
        dq = scale · dS k,   dk = scale · dSᵀ q,   dv = Pᵀ dO

    Args:
        grad_out: dO `[B, H, N, Dv]` or `None` for zero.
        grad_lse: `[B, H, N]` or `None` for zero.
        query: as in the forward pass, and so are the rest.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`.
        query_frames: integers `[N]`.
        key_frames: integers `[M]`.
        scale: factor of the logits.
        sigma: width of the band.
        strength: factor of the band.
        row_max_grad: whether a gradient flows through m.

    Returns:
        The gradients of query, key and value, each in the dtype of its tensor.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    band = strength * frame_band(query_frames, key_frames, sigma, wide)
    weights, _, _, place = _probabilities(query, key, band, scale, row_max_grad)
    grad_weights = torch.zeros_like(weights)  # dP
    grad_value = torch.zeros_like(value)
    if grad_out is not None:
        grad_weights = grad_out.to(wide) @ value.to(wide).mT
        grad_value = (weights.mT @ grad_out.to(wide)).to(value.dtype)
    centre = (weights * grad_weights).sum(-1, keepdim=True)  # δ
    if grad_lse is not None:
        centre = centre - grad_lse[..., None].to(wide)
    grad_scores = weights * (grad_weights - centre)  # dS'
    if row_max_grad:
        through_max = (band * grad_scores).sum(-1, keepdim=True)
        grad_scores = grad_scores.scatter_add(-1, place[..., None], through_max)
    grad_query = (scale * grad_scores @ key.to(wide)).to(query.dtype)
    grad_key = (scale * grad_scores.mT @ query.to(wide)).to(key.dtype)
    return grad_query, grad_key, grad_value
