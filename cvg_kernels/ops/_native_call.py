"""How tensors are handed to the C++ kernels."""

from __future__ import annotations

import torch

#: The codes of `csrc/include/cvg/dtype_code.h`.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def strided(tensor: torch.Tensor | None, rank: int = 4) -> tuple[int, tuple[int, ...]]:
    """Address and `rank` strides; a tensor of fewer dimensions has zeros for the others, an absent one address 0."""
    if tensor is None:
        return 0, (0,) * rank
    return tensor.data_ptr(), tensor.stride() + (0,) * (rank - tensor.ndim)


def address(tensor: torch.Tensor | None) -> int:
    """Where the numbers are, 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()
