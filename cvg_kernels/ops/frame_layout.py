"""Convolution layouts as temporal attention takes them: views, so that nothing is rearranged in memory."""

from __future__ import annotations

import torch

from cvg_kernels.errors import ArgumentError


def frame_sequences(x: torch.Tensor, heads: int, frames: int | None = None) -> torch.Tensor:
    """The frames of every position, a view for `temporal_attention` of what convolutions work on.

    `rearrange(x, "(b f) (n d) h w -> b (h w) n f d")`, or `"b (n d) f h w -> …"`, without the copy that bringing each
    position's frames together costs: the kernels read through the strides.

        q, k, v = (frame_sequences(y, heads=8, frames=16) for y in (to_q(x), to_k(x), to_v(x)))
        x = frame_images(temporal_attention(q, k, v, sigma=1.0).out, x.shape)

    Args:
        x: `[B·F, C, h, w]`, the frames of a video one after another, or `[B, C, F, h, w]`; C = heads · head_dim. Any
            strides, but h and w must lie so that they are one axis (as they do, also in `channels_last`).
        heads: how many the channels hold.
        frames: F, for the four-dimensional layout.

    Returns:
        `[B, h·w, heads, F, head_dim]`, a view of `x`.

    Raises:
        ArgumentError: if the shape does not fit, or h and w are not one axis.
    """
    if x.ndim not in (4, 5) or (x.ndim == 4) == (frames is None):
        raise ArgumentError(
            "x must be [B·F, C, h, w] with frames given, or [B, C, F, h, w] without, got "
            f"{tuple(x.shape)} with frames={frames}"
        )
    if heads < 1 or x.shape[1] % heads:
        raise ArgumentError(f"heads must divide the {x.shape[1]} channels of x, got {heads}")
    if frames is not None and (frames < 1 or x.shape[0] % frames):
        raise ArgumentError(f"frames must divide the {x.shape[0]} images of x, got {frames}")
    video = x.transpose(1, 2) if frames is None else x.unflatten(0, (-1, frames))  # [B, F, C, h, w]
    rows, columns = video.shape[-2:]
    if rows > 1 and columns > 1 and video.stride(-2) != columns * video.stride(-1):
        raise ArgumentError(
            f"x must have rows and columns that are one axis in memory, got strides {x.stride()}"
        )
    split = video.unflatten(2, (heads, -1)).flatten(-2)  # [B, F, heads, head_dim, h·w]
    return split.permute(0, 4, 2, 1, 3)


def frame_images(out: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """What `frame_sequences` took apart, put together again.

    Args:
        out: `[B, h·w, heads, F, head_dim]`, of `temporal_attention`.
        shape: of the result, `[B·F, C, h, w]` or `[B, C, F, h, w]`; C may be −1.

    Returns:
        The layout of that shape: a view where the input of `frame_sequences` was `channels_last`, else one copy.

    Raises:
        ArgumentError: for another number of dimensions.
    """
    if out.ndim != 5 or len(shape) not in (4, 5):
        raise ArgumentError(
            "out must have five dimensions and shape four or five numbers, got "
            f"{tuple(out.shape)} and {tuple(shape)}"
        )
    video = (
        out.permute(0, 3, 2, 4, 1).flatten(2, 3).unflatten(-1, tuple(shape[-2:]))
    )  # [B, F, C, h, w]
    return video.flatten(0, 1) if len(shape) == 4 else video.transpose(1, 2)
