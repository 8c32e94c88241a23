"""Guidance mixes by the reference, as a backend; as `_guidance_mix_native`."""

from __future__ import annotations

from cvg_kernels.reference import guidance_mix as reference


def forward(predictions, scales, sample_scales, rescale, out) -> None:
    """Fills `out`, which lies in memory as the predictions do; see `cvg_kernels.reference.guidance_mix`."""
    steps = scales if sample_scales is None else sample_scales
    out.copy_(reference.guidance_mix(predictions, steps, rescale=rescale))
