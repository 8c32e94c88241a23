"""Makes Triton's interpreter round float32 to bfloat16 as GPUs do: to nearest, ties to even.

By itself it cuts the lower bits off (Triton 3.9), twice the error and all of it to one side, in every P and dS that a
kernel hands to a product and in every result. The other roundings that matter here are right: float16 is numpy's, and
products of 16-bit numbers, which `dot` widens first, are exact in float32, as in a tensor core.
"""

from __future__ import annotations

import numpy as np


def bfloat16_bits(numbers: np.ndarray) -> np.ndarray:
    """float32 → the bits of the nearest bfloat16; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def round_as_gpus_do() -> None:
    """Replaces the interpreter's casts between float32 and bfloat16, in this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    others = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp")}

    def cast(name: str, builder, src, dst_type, *rounding):
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(bfloat16_bits(src.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            wide = src.data.astype(np.uint32) << np.uint32(16)
            return TensorHandle(wide.view(np.float32), tl.float32)
        return others[name](builder, src, dst_type, *rounding)

    InterpreterBuilder.cast_impl = lambda *given: cast("cast_impl", *given)
    InterpreterBuilder.create_fp_to_fp = lambda *given: cast("create_fp_to_fp", *given)
