"""How tensors are handed to the C++ kernels."""

from __future__ import annotations

import os

import torch

_PROCESS = os.getpid()
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


def threads() -> int:
    """How many threads a kernel may use: those of torch, and one in a process that was forked.

    The threads that OpenMP made before a fork are not in the new process, which would wait for them for ever, as
    torch's own operations do there.
    """
    return torch.get_num_threads() if os.getpid() == _PROCESS else 1
