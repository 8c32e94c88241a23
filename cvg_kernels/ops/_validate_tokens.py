"""Checks of what names single keys of attention: token ids, and a bias of their logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops._integers import normalize_integers


def normalize_token_ids(
    token_ids: torch.Tensor | Sequence[int], query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Ids as contiguous int64 `[B, K]` on the query's device, checked where a look at them is free."""
    batch, keys = query.shape[0], key.shape[2]
    token_ids, bounds = normalize_integers("token_ids", token_ids, query, "[K] or [B, K]")
    if token_ids.ndim not in (1, 2):
        raise ArgumentError(f"token_ids must have shape [K] or [B, K] with B = {batch}, got {tuple(token_ids.shape)}")
    if token_ids.shape[-1] == 0:
        raise ArgumentError("token_ids must name at least one key, got none")
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"token_ids must be int64 or int32, got {token_ids.dtype}")
    if token_ids.ndim == 2 and token_ids.shape[0] != batch:
        raise ArgumentError(f"token_ids must have shape [K] or [B, K] with B = {batch}, got {tuple(token_ids.shape)}")
    if bounds is not None and (bounds[0] < 0 or bounds[1] >= keys):
        outside = bounds[0] if bounds[0] < 0 else bounds[1]
        raise ArgumentError(f"token_ids must lie in [0, {keys}) for {keys} keys, got {outside}")
    if token_ids.ndim == 1:
        token_ids = token_ids.expand(batch, -1)
    return token_ids.to(query.device, torch.int64).contiguous()


def normalize_token_bias(
    token_bias: torch.Tensor, token_ids: torch.Tensor | None, query: torch.Tensor
) -> torch.Tensor:
    """The bias as `[B, K, N]` in the wide type, expanded where it was given smaller;
    over repeats of a key, their sum.
    """
    if token_ids is None:
        raise ArgumentError("token_bias needs token_ids: the keys whose logits it is added to")
    (batch, tokens), queries = token_ids.shape, query.shape[2]
    if not isinstance(token_bias, torch.Tensor) or not token_bias.is_floating_point():
        given = getattr(token_bias, "dtype", type(token_bias).__name__)
        raise ArgumentError(f"token_bias must be a floating point tensor or None, got {given}")
    if token_bias.device != query.device:
        raise ArgumentError(f"token_bias must be on {query.device}, got {token_bias.device}")
    shape = tuple(token_bias.shape)
    bias = token_bias[None] if token_bias.ndim == 1 else token_bias
    bias = bias[..., None] if bias.ndim == 2 else bias
    wanted = (batch, tokens, queries)
    fits = bias.ndim == 3 and bias.shape[1] == tokens
    if not fits or bias.shape[0] not in (1, batch) or bias.shape[2] not in (1, queries):
        raise ArgumentError(
            f"token_bias must have shape [K], [B, K] or [B, K, N] with (B, K, N) = {wanted}, got {shape}"
        )
    bias = bias.to(torch.promote_types(query.dtype, torch.float32)).expand(batch, -1, -1)
    # Summed where a key occurs first, and read back from there: no product, in which −∞ · 0 would be no number.
    first = (token_ids[:, :, None] == token_ids[:, None, :]).byte().argmax(-1)[..., None]
    first = first.expand(bias.shape)
    return torch.zeros_like(bias).scatter_add(1, first, bias).gather(1, first).expand(wanted)
