"""Gen-1's structure representation: the public function and its checks."""

from __future__ import annotations

import torch

from cvg_kernels.backends import Backend, parse_backend, require
from cvg_kernels.errors import ArgumentError, is_whole
from cvg_kernels.ops._trace import note_backend
from cvg_kernels.ops._validate_given import check_floating, described, holds_numbers
from cvg_kernels.reference import depth_structure as reference

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def depth_structure(depth: torch.Tensor, t_s: int | torch.Tensor, *, backend: str | Backend = "auto") -> torch.Tensor:
    """Takes detail from depth maps: t_s rounds of blur and downsampling by 2, then back to their size.

    With t_s the user says how much of the structure of a clip a generated one must keep: 0 all of it, 7 (Gen-1's
    largest) little more than where there is something. A round is a binomial blur (1, 2, 1)/4 and every second pixel,
    ⌈h/2⌉ × ⌈w/2⌉ of them, never below one; the way back is bilinear with `align_corners=False`. Computed in float32 at
    least; differentiable in depth any number of times.

    Args:
        depth: `[B, F, h, w]`, floating point.
        t_s: the number of rounds, or an integer tensor `[B]`, one a sample. A tensor is read, so one on a GPU is
            waited for.
        backend: `"auto"` or `"reference"`. The rounds shrink fast and a clip is treated once, before the denoising: a
            kernel of its own would save nothing that can be felt.

    Returns:
        `[B, F, h, w]` in the dtype of depth.

    Raises:
        ArgumentError: if an argument does not fit.
        BackendUnavailableError: if the named backend cannot run here.

    "Structure and Content-Guided Video Synthesis with Diffusion Models" (Gen-1), section on structure representation.

    Examples:
        >>> depth = torch.rand(1, 8, 32, 32)
        >>> cvg.depth_structure(depth, t_s=3).shape
        torch.Size([1, 8, 32, 32])
        >>> torch.equal(cvg.depth_structure(depth, t_s=0), depth)
        True
    """
    check_floating("depth", depth, "[B, F, h, w] without empty maps", 4)
    if 0 in depth.shape[2:]:
        raise ArgumentError(f"depth must be floating point [B, F, h, w] without empty maps, got {described(depth)}")
    if isinstance(t_s, torch.Tensor):
        if t_s.shape != depth.shape[:1] or t_s.dtype not in _INTEGERS:
            raise ArgumentError(
                f"t_s must be a number or integers [B] = {tuple(depth.shape[:1])}, got {t_s.dtype} {tuple(t_s.shape)}"
            )
    elif not is_whole(t_s):
        raise ArgumentError(f"t_s must be an integer or an integer tensor [B], got {t_s!r}")
    if isinstance(t_s, torch.Tensor) and not holds_numbers(t_s):
        raise ArgumentError("t_s must be a number, or a tensor that holds numbers, which it reads")
    negative = bool(t_s.lt(0).any()) if isinstance(t_s, torch.Tensor) else t_s < 0
    if negative:
        raise ArgumentError(f"t_s must not be negative, got {t_s!r}")
    if depth.numel() == 0:
        return depth.clone()
    chosen = parse_backend(backend)
    if chosen is not Backend.AUTO:
        require("depth_structure", chosen, depth.device)
    note_backend("depth_structure", "reference")
    return reference.depth_structure(depth, t_s)
