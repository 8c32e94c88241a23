"""Attention between the frames at every place, out of attention over a whole video: the definition.

    S_ij = scale · q[i·P + p] · k[j·P + p] + bias          i, j: frames; p: a place of a frame; P places a frame
    maps_ij = exp(S_ij − lse[i·P + p])                      probabilities of the full attention
    maps_ij = exp(S_ij) / Σ_l exp(S_il)                     without lse: of the frames alone, rows that sum to 1

A row whose lse, or whose every logit, is −∞ has maps = 0.
"""

from __future__ import annotations

import torch


def by_place(tokens: torch.Tensor, frames: int, places: int, start: int) -> torch.Tensor:
    """A view `[B, P, H, F, …]` of the video's tokens, which lie frame by frame in `[B, H, N, …]`.

    Args:
        tokens: `[B, H, N, …]`, query, key or what belongs to them.
        frames: F.
        places: P, of a frame.
        start: where the video begins among the N tokens.
    """
    video = tokens.narrow(2, start, frames * places).unflatten(2, (frames, places))
    return video.movedim(3, 1)


def temporal_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    scale: float,
    head_mean: bool,
) -> torch.Tensor:
    """Probabilities with which a place of one frame attends to itself in the others.

    Args:
        query: `[B, P, H, F, D]`, as `by_place` sees it.
        key: `[B, P, H, F, D]`.
        lse: `[B, P, H, F]`, log Σ exp of all logits of a query, or `None`: of those of the frames.
        bias: added to the logits, broadcasts to `[B, P, H, F, F]`; or `None`.
        scale: factor of the logits.
        head_mean: average over the heads.

    Returns:
        `[B, P, F, F]`, or `[B, H, P, F, F]` with heads, in float32 (float64 for float64); row = attending frame.
    """
    weights = _probabilities(query, key, lse, bias, scale)
    return weights.mean(2) if head_mean else weights.transpose(1, 2)


def _probabilities(query, key, lse, bias, scale):
    """P `[B, P, H, F, F]`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scale * (query.to(wide) @ key.to(wide).mT)
    if bias is not None:
        scores = scores + bias.to(wide)
    # Masked rows are replaced before exp, not after, so that no NaN reaches its gradient.
    if lse is None:
        unseen = (scores == -torch.inf).all(-1, keepdim=True)
        return scores.masked_fill(unseen, 0.0).softmax(-1).masked_fill(unseen, 0.0)
    lse = lse.to(wide)[..., None]
    unseen = lse == -torch.inf
    return (scores - lse.masked_fill(unseen, 0.0)).exp().masked_fill(unseen, 0.0)


def temporal_maps_backward(
    grad_maps: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    scale: float,
    head_mean: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradient in closed form, what every kernel computes.

        dP_ij = dmaps_ij / H,  or dmaps_ij with heads
        dS_ij = P_ij dP_ij,                     dlse_i = −Σ_j dS_ij
        dS_ij = P_ij (dP_ij − Σ_l P_il dP_il)   without lse
        dq = scale · dS k,   dk = scale · dSᵀ q

    Args:
        grad_maps: dmaps, of the shape of the maps.
        query: as in the forward pass, and so are the rest.
        key: `[B, P, H, F, D]`.
        lse: `[B, P, H, F]` or `None`.
        bias: broadcasts to `[B, P, H, F, F]`, or `None`.
        scale: factor of the logits.
        head_mean: average over the heads.

    Returns:
        The gradients of query, key and lse (`None` without it), each in the dtype of its tensor.
    """
    weights = _probabilities(query, key, lse, bias, scale)
    wide = weights.dtype
    grads = grad_maps.to(wide)
    grads = grads.unsqueeze(2) / query.shape[2] if head_mean else grads.transpose(1, 2)
    grad_scores = weights * grads
    totals = grad_scores.sum(-1)
    grad_lse = None if lse is None else (-totals).to(lse.dtype)
    if lse is None:
        grad_scores = grad_scores - weights * totals[..., None]
    grad_query = (scale * grad_scores @ key.to(wide)).to(query.dtype)
    grad_key = (scale * grad_scores.mT @ query.to(wide)).to(key.dtype)
    return grad_query, grad_key, grad_lse
