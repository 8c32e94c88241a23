"""One call of the attention core as its backends take it, and what they give back.

    S  = scale · q kᵀ + key_bias                                   without a band
    S  = scale · q kᵀ;   m_i = max_j S_ij                          with one
    S' = S + m · strength · exp(−(f_i − f_j)² / 2σ²)               with one, where both tokens belong to a frame
    S'[..., token_ids] += token_bias
    P  = softmax(S');  out = P v;  maps = P[..., token_ids];  lse = log Σ_j exp S'

A backend is a module with these functions:

    forward(call) -> AttentionResult
    backward(call, result, grads, needed) -> (grad_query, grad_key, grad_value, grad_token_bias)
    capture(call, lse) -> maps                                      where the log-sum-exp is known already

A key bias and a band exclude each other, and so do a token bias and a band.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cvg_kernels.kernels import Facts


class Band(NamedTuple):
    """VSTAR's band by the distance of frames."""

    query_frames: torch.Tensor  #: int32 `[N]`, −1: of no frame
    key_frames: torch.Tensor  #: int32 `[M]`
    sigma: float  #: width in frames, above 0
    strength: float  #: factor of the band
    row_max_grad: bool  #: whether a gradient flows through m


class AttentionCall(NamedTuple):
    """The arguments, checked. `wide` is float32, or float64 for a float64 query."""

    query: torch.Tensor  #: `[B, H, N, D]`, any strides, as key and value
    key: torch.Tensor  #: `[B, H, M, D]`
    value: torch.Tensor | None  #: `[B, H, M, Dv]`; `None`: maps only
    token_ids: torch.Tensor | None  #: contiguous int64 `[B, K]`, repeats allowed; `None`: no maps
    key_bias: torch.Tensor | None  #: wide, contiguous `[B, M]`, −∞ where a key is not seen
    #: Wide `[B, K, N]`, any strides (expanded ones too), −∞ where a key is not seen. Of a key that occurs twice in
    #: `token_ids` both occurrences carry the same numbers, and the key has them once.
    token_bias: torch.Tensor | None
    band: Band | None
    scale: float
    head_mean: bool  #: maps are averaged over the heads


class AttentionResult(NamedTuple):
    """What the forward pass gives, and what the backward pass reads, but for the maps: there they are `None`."""

    out: torch.Tensor | None  #: `[B, H, N, Dv]`, in memory as `dense_like(query, Dv)`; `None` without values
    maps: torch.Tensor | None  #: wide, contiguous `[B, K, N]` or `[B, H, K, N]`; `None` without token ids
    lse: torch.Tensor  #: wide, contiguous `[B, H, N]`
    row_max: torch.Tensor | None = None  #: m, wide `[B, H, N]`; `None` without a band
    row_argmax: torch.Tensor | None = None  #: the first key that has m, int32 `[B, H, N]`; `None` without a band


class AttentionGrads(NamedTuple):
    """The gradients that come in; `None` stands for zero and costs no work."""

    out: torch.Tensor | None  #: any strides
    maps: torch.Tensor | None
    lse: torch.Tensor | None


class Needed(NamedTuple):
    """Which gradients go out; the others are `None`.

    Those of query, key and value lie in memory as `dense_like` of their tensors; that of the token bias is wide,
    contiguous `[B, K, N]`. Of a key that occurs twice the numbers of its occurrences add up to the gradient of its
    column.
    """

    query: bool
    key: bool
    value: bool
    token_bias: bool = False


def facts_of(call: AttentionCall, deterministic: bool = False, *of_backward: bool) -> Facts:
    """What the choice of a kernel may depend on; of a backward pass the gradients that are needed and those that
    arrive.
    """
    query, key, value, ids = call[:4]
    batch, heads, queries, head_dim = query.shape
    return Facts(
        query.device,
        query.dtype,
        batch,
        heads,
        queries,
        key.shape[2],
        head_dim,
        0 if value is None else value.shape[3],
        0 if ids is None else ids.shape[1],
        0,
        0,
        0,
        call.key_bias is not None,
        call.token_bias is not None,
        call.band is not None,
        False,
        *(of_backward or (False,) * 7),
        deterministic,
    )
