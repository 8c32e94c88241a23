"""Attention that also returns the probabilities of chosen keys: the definition.

    P    = softmax(scale · q kᵀ + mask)          over the keys
    out  = P v
    maps = P[..., token_ids]                     averaged over heads, or per head
    lse  = log Σ exp(scale · q kᵀ + mask)        over the keys

A row whose keys are all masked has P = 0, out = 0, maps = 0 and lse = −∞. Everything here holds the N×M matrix, can be
differentiated twice, and is written to be read.
"""

from __future__ import annotations

import torch


def probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """P `[B, H, N, M]` and lse `[B, H, N]`, float32 at least.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        mask: additive, broadcastable to `[B, H, N, M]`, −∞ where a key is not seen.
        scale: factor of the logits.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scale * (query.to(wide) @ key.to(wide).mT)  # [B, H, N, M]
    if mask is not None:
        scores = scores + mask.to(wide)
    # A masked row is replaced before the softmax, not after, so that no NaN reaches its gradient.
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(unseen, 0.0)
    weights = scores.softmax(-1).masked_fill(unseen, 0.0)
    return weights, scores.logsumexp(-1).masked_fill(unseen[..., 0], -torch.inf)


def attention_with_capture(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    token_ids: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    head_mean: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Attention, the maps of chosen keys, and the log-sum-exp of the logits.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`, or `None` to compute the maps only.
        token_ids: int64 `[B, K]`, indices of keys; an index may occur twice.
        scale: factor of the logits.
        mask: additive, broadcastable to `[B, H, N, M]`.
        head_mean: average the maps over the heads.

    Returns:
        out `[B, H, N, Dv]` in the query's dtype (or `None`), maps `[B, K, N]` or `[B, H, K, N]` and lse `[B, H, N]`,
        both float32, or float64 for float64 input.
    """
    weights, lse = probabilities(query, key, mask, scale)
    chosen = token_ids[:, None, None, :].expand(*weights.shape[:-1], -1)  # [B, H, N, K]
    maps = weights.gather(-1, chosen).mT  # [B, H, K, N]
    if head_mean:
        maps = maps.mean(1)
    out = None if value is None else (weights @ value.to(weights.dtype)).to(query.dtype)
    return out, maps, lse


def attention_with_capture_backward(
    grad_out: torch.Tensor | None,
    grad_maps: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    token_ids: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    head_mean: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradient in closed form, what every kernel computes.

        dP_ij = dO_i · V_j + Σ_κ [j = token_κ] dC_iκ
        dS    = P ∘ (dP − Σ_j P_ij dP_ij + dlse_i)
        dq = scale · dS k,   dk = scale · dSᵀ q,   dv = Pᵀ dO

    Args:
        grad_out: dO `[B, H, N, Dv]` or `None` for zero.
        grad_maps: dC, shaped as the maps, or `None` for zero.
        grad_lse: `[B, H, N]` or `None` for zero.
        query: as in the forward pass, and so are the rest.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]` or `None`.
        token_ids: int64 `[B, K]`.
        scale: factor of the logits.
        mask: additive.
        head_mean: whether the maps were averaged.

    Returns:
        The gradients of query, key and value (`None` without values), each in the dtype of its tensor.
    """
    weights, _ = probabilities(query, key, mask, scale)
    wide = weights.dtype
    grad_weights = torch.zeros_like(weights)  # dP
    grad_value = None if value is None else torch.zeros_like(value)
    if grad_out is not None:
        grad_weights = grad_out.to(wide) @ value.to(wide).mT
        grad_value = (weights.mT @ grad_out.to(wide)).to(value.dtype)
    if grad_maps is not None:
        heads = query.shape[1]
        per_head = grad_maps[:, None] / heads if head_mean else grad_maps  # [B, 1 | H, K, N]
        chosen = token_ids[:, None, None, :].expand(*weights.shape[:-1], -1)
        grad_weights = grad_weights.scatter_add(
            -1, chosen, per_head.to(wide).mT.expand(chosen.shape)
        )
    centre = (weights * grad_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        centre = centre - grad_lse[..., None].to(wide)
    grad_scores = weights * (grad_weights - centre)
    grad_query = (scale * grad_scores @ key.to(wide)).to(query.dtype)
    grad_key = (scale * grad_scores.mT @ query.to(wide)).to(key.dtype)
    return grad_query, grad_key, grad_value
