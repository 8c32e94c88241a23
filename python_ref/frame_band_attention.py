"""The band by frame distance of attention over all tokens of a video: the definition.

    S    = scale · q kᵀ                          over all tokens of all frames
    G_ij = exp(−(f_i − f_j)² / 2σ²)              f: the frame of a token; 0 where either belongs to none (f = −1)
    S'   = S + m · strength · G,   m_i = max_j S_ij

VSTAR's regularisation of temporal attention, carried over to networks that attend in space and time at once. Attention
under it is `cvg_kernels.reference.attention` with `band = strength · G`.
"""

from __future__ import annotations

import torch


def frame_band(query_frames: torch.Tensor, key_frames: torch.Tensor, sigma: float, dtype: torch.dtype) -> torch.Tensor:
    """G `[N, M]`.

    Args:
        query_frames: integers `[N]`, −1 for a token of no frame.
        key_frames: integers `[M]`.
        sigma: width in frames, above 0.
        dtype: dtype of the result.
    """
    distance = (query_frames[:, None] - key_frames[None, :]).to(dtype) / sigma
    inside = (query_frames[:, None] >= 0) & (key_frames[None, :] >= 0)
    return (-0.5 * distance.square()).exp() * inside
