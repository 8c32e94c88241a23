"""Attention with captured tokens, a bias on them, or a band by frame distance, in Triton:
forward, backward, capture.
"""

from __future__ import annotations

from cvg_kernels._triton.attention_backward import backward
from cvg_kernels._triton.attention_forward import capture, forward

__all__ = ["backward", "capture", "forward"]
