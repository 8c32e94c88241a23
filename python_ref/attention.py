"""Attention that also returns the probabilities of chosen keys: the definition.

    S    = scale · q kᵀ + mask,   m_i = max_j S_ij
    S'   = S + m · band                          a band over pairs of tokens, of `frame_band_attention`
    S'[..., token_ids] += token_bias             a key that occurs twice gets both
    P    = softmax(S')                           over the keys
    out  = P v
    maps = P[..., token_ids]                     averaged over heads, or per head
    lse  = log Σ_j exp S'_ij

A row whose keys are all masked has P = 0, out = 0, maps = 0 and lse = −∞. Where several keys tie for the row's
maximum, the gradient of m goes to the first of them. Everything here holds the N×M matrix, can be differentiated
twice, and is written to be read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Attended(NamedTuple):
    """What attention gives; float32 except for `out`, or float64 for float64 input."""

    out: torch.Tensor | None  #: `[B, H, N, Dv]` in the query's dtype, `None` without values
    maps: torch.Tensor | None  #: `[B, K, N]` or `[B, H, K, N]`, `None` without token ids
    lse: torch.Tensor  #: `[B, H, N]`
    row_max: torch.Tensor  #: m `[B, H, N]`
    row_argmax: torch.Tensor  #: the first key that has m, int64 `[B, H, N]`


class Weights(NamedTuple):
    """The probabilities of all keys, and what they were made of."""

    weights: torch.Tensor  #: P `[B, H, N, M]`
    lse: torch.Tensor
    row_max: torch.Tensor
    row_argmax: torch.Tensor


def probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    token_bias: torch.Tensor | None = None,
    band: torch.Tensor | None = None,
    row_max_grad: bool = True,
) -> Weights:
    """P and what it is made of, float32 at least.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        scale: factor of the logits.
        mask: additive, broadcastable to `[B, H, N, M]`, −∞ where a key is not seen.
        token_ids: int64 `[B, K]`, the keys of the token bias.
        token_bias: `[B, K, N]`, added to the logits of these keys.
        band: `[N, M]`, the factor of m.
        row_max_grad: whether a gradient flows through m.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scale * (query.to(wide) @ key.to(wide).mT)  # [B, H, N, M]
    if mask is not None:
        scores = scores + mask.to(wide)
    row_max, row_argmax = scores.max(-1)
    if band is not None:
        factor = row_max if row_max_grad else row_max.detach()
        scores = scores + factor[..., None] * band.to(wide)
    if token_bias is not None:
        columns = token_ids[:, None, None, :].expand(*scores.shape[:-1], -1)
        scores = scores.scatter_add(-1, columns, token_bias.to(wide).mT[:, None].expand(columns.shape))
    # A masked row is replaced before the softmax, not after, so that no NaN reaches its gradient.
    unseen = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(unseen, 0.0)
    weights = scores.softmax(-1).masked_fill(unseen, 0.0)
    lse = scores.logsumexp(-1).masked_fill(unseen[..., 0], -torch.inf)
    return Weights(weights, lse, row_max, row_argmax)


def attention_with_capture(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    token_bias: torch.Tensor | None = None,
    band: torch.Tensor | None = None,
    row_max_grad: bool = True,
    head_mean: bool = True,
) -> Attended:
    """Attention, the maps of chosen keys, and the log-sum-exp of the logits.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]`, or `None` to compute the maps only.
        token_ids: int64 `[B, K]`, indices of keys; an index may occur twice. `None`: no maps.
        scale: factor of the logits.
        mask: additive, broadcastable to `[B, H, N, M]`.
        token_bias: `[B, K, N]`, added to the logits of the chosen keys.
        band: `[N, M]`, the factor of m.
        row_max_grad: whether a gradient flows through m.
        head_mean: average the maps over the heads.
    """
    weights, *rows = probabilities(
        query,
        key,
        scale=scale,
        mask=mask,
        token_ids=token_ids,
        token_bias=token_bias,
        band=band,
        row_max_grad=row_max_grad,
    )
    maps = None
    if token_ids is not None:
        chosen = token_ids[:, None, None, :].expand(*weights.shape[:-1], -1)  # [B, H, N, K]
        maps = weights.gather(-1, chosen).mT  # [B, H, K, N]
        maps = maps.mean(1) if head_mean else maps
    out = None if value is None else (weights @ value.to(weights.dtype)).to(query.dtype)
    return Attended(out, maps, *rows)


def attention_with_capture_backward(
    grad_out: torch.Tensor | None,
    grad_maps: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    token_ids: torch.Tensor | None,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    token_bias: torch.Tensor | None = None,
    band: torch.Tensor | None = None,
    row_max_grad: bool = True,
    head_mean: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradient in closed form, what every kernel computes.

        dP_ij  = dO_i · V_j + Σ_κ [j = token_κ] dC_iκ
        dS'    = P ∘ (dP − Σ_j P_ij dP_ij + dlse_i)
        dbias  = Σ_h dS'[..., token_ids]
        dS_ij  = dS'_ij + [j = argmax_l S_il] · Σ_l band_il dS'_il       the second term with m's gradient only
        dq = scale · dS k,   dk = scale · dSᵀ q,   dv = Pᵀ dO

    Args:
        grad_out: dO `[B, H, N, Dv]` or `None` for zero.
        grad_maps: dC, shaped as the maps, or `None` for zero.
        grad_lse: `[B, H, N]` or `None` for zero.
        query: as in the forward pass, and so are the rest.
        key: `[B, H, M, D]`.
        value: `[B, H, M, Dv]` or `None`.
        token_ids: int64 `[B, K]` or `None`.
        scale: factor of the logits.
        mask: additive.
        token_bias: `[B, K, N]`.
        band: `[N, M]`.
        row_max_grad: whether a gradient flows through m.
        head_mean: whether the maps were averaged.

    Returns:
        The gradients of query, key and value (`None` without values), each in the dtype of its tensor, and that of the
        token bias `[B, K, N]` (`None` without one).
    """
    weights, _, _, row_argmax = probabilities(
        query, key, scale=scale, mask=mask, token_ids=token_ids, token_bias=token_bias, band=band
    )
    wide = weights.dtype
    grad_weights = torch.zeros_like(weights)  # dP
    grad_value = None if value is None else torch.zeros_like(value)
    chosen = None
    if token_ids is not None:
        chosen = token_ids[:, None, None, :].expand(*weights.shape[:-1], -1)  # [B, H, N, K]
    if grad_out is not None:
        grad_weights = grad_out.to(wide) @ value.to(wide).mT
        grad_value = (weights.mT @ grad_out.to(wide)).to(value.dtype)
    if grad_maps is not None:
        per_head = grad_maps[:, None] / query.shape[1] if head_mean else grad_maps  # [B, 1 | H, K, N]
        grad_weights = grad_weights.scatter_add(-1, chosen, per_head.to(wide).mT.expand(chosen.shape))
    delta = (weights * grad_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None].to(wide)
    grad_scores = weights * (grad_weights - delta)  # dS'
    grad_bias = None if token_bias is None else grad_scores.gather(-1, chosen).sum(1).mT
    if band is not None and row_max_grad:
        through_max = (band.to(wide) * grad_scores).sum(-1, keepdim=True)
        grad_scores = grad_scores.scatter_add(-1, row_argmax[..., None], through_max)
    grad_query = (scale * grad_scores @ key.to(wide)).to(query.dtype)
    grad_key = (scale * grad_scores.mT @ query.to(wide)).to(key.dtype)
    return grad_query, grad_key, grad_value, grad_bias
