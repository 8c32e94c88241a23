"""Guidance as a sum of differences between predictions: the kernel and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cvg_kernels._triton.launch import Launch

_BLOCK = 1024


@triton.jit
def _step(mix, before, apart, prediction, offsets, inside, scale):
    """One term more: mix + s (p_i − p_{i−1}), or p_i itself while no scale was `apart` from 1."""
    after = tl.load(prediction + offsets, mask=inside, other=0.0).to(tl.float32)
    apart += tl.abs(scale - 1.0)
    return tl.where(apart == 0.0, after, mix + scale * (after - before)), after, apart


@triton.jit
def mix_kernel(
    p0, p1, p2, p3, out, sample_scales, s1, s2, s3, batch, elements, blocks,
    COUNT: tl.constexpr, PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one sample of p₀ + Σ s_i (p_i − p_{i−1}).

    Predictions and out hold `batch` samples of `elements` numbers in one order; sample_scales is `[n, B]` float32.
    """
    program = tl.program_id(0)
    sample = program // blocks
    offset = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < elements
    offsets = sample.to(tl.int64) * elements + offset
    if PER_SAMPLE:
        s1 = tl.load(sample_scales + sample)
        if COUNT > 2:
            s2 = tl.load(sample_scales + batch + sample)
        if COUNT > 3:
            s3 = tl.load(sample_scales + 2 * batch + sample)
    before = tl.load(p0 + offsets, mask=inside, other=0.0).to(tl.float32)
    mix, before, apart = _step(before, before, 0.0, p1, offsets, inside, s1)
    if COUNT > 2:
        mix, before, apart = _step(mix, before, apart, p2, offsets, inside, s2)
    if COUNT > 3:
        mix, before, apart = _step(mix, before, apart, p3, offsets, inside, s3)
    tl.store(out + offsets, mix.to(out.dtype.element_ty), mask=inside)


def launch(predictions, scales, sample_scales, out: torch.Tensor) -> Launch:
    """The launch that fills `out`; tensors lie alike, one dense sample after the other."""
    batch = out.shape[0]
    elements = out.numel() // max(batch, 1)
    blocks = triton.cdiv(elements, _BLOCK)
    numbers = [*(scales or ()), 0.0, 0.0, 0.0][:3]
    absent = [None] * (4 - len(predictions))
    arguments = {
        **{f"p{i}": tensor for i, tensor in enumerate([*predictions, *absent])},
        "out": out, "sample_scales": sample_scales,
        **{f"s{i}": number for i, number in enumerate(numbers, 1)},
        "batch": batch, "elements": elements, "blocks": blocks,
    }  # fmt: skip
    constants = {"COUNT": len(predictions), "PER_SAMPLE": sample_scales is not None, "BLOCK": _BLOCK}
    # Products are rounded before they are added, as PyTorch does.
    return Launch(mix_kernel, (batch * blocks,), arguments, constants, 4, 1, fp_fusion=False)


def forward(predictions, scales, sample_scales, rescale, out) -> None:
    """Fills `out` with the mix; `rescale` is 0."""
    launch(predictions, scales, sample_scales, out).run()
