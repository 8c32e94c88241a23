"""Guidance mixes by the C++ kernel: passes addresses."""

from __future__ import annotations

from cvg_kernels import native
from cvg_kernels.ops._native_call import DTYPE_CODES, threads


def forward(predictions, scales, sample_scales, rescale, out) -> None:
    """Fills `out`, which lies in memory as the predictions do; see `cvg_kernels.reference.guidance_mix`."""
    batch = out.shape[0]
    if sample_scales is None:
        numbers = [scale for scale in scales for _ in range(batch)]
    else:
        numbers = sample_scales.flatten().tolist()
    native.load("cpu").guidance_mix(
        batch,
        out.numel() // batch,
        DTYPE_CODES[out.dtype],
        [tensor.data_ptr() for tensor in predictions],
        numbers,
        rescale,
        threads(),
        out.data_ptr(),
    )
