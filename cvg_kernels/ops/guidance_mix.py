"""Guidance mixes: the public function, its checks, its registration with torch, and its backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cvg_kernels.backends import Backend
from cvg_kernels.errors import ArgumentError
from cvg_kernels.kernels import Facts
from cvg_kernels.ops._choice import run_kernel
from cvg_kernels.ops._registration import backend_on
from cvg_kernels.ops._trace import note_backend, register_autograd
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate_given import described, normalize_number, normalize_tensors
from cvg_kernels.reference import guidance_mix as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def guidance_mix(
    predictions: Sequence[torch.Tensor],
    scales: Sequence[float | torch.Tensor],
    *,
    rescale: float = 0.0,
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """Combines the predictions of a guided denoising step in one pass over them.

        mix = p₀ + s₁ (p₁ − p₀) + … + sₙ (pₙ − pₙ₋₁)

    Classifier-free guidance is `guidance_mix([uncond, cond], [ω])`, and Gen-1's temporal guidance
    μ^π_∅ + ω_t (μ_∅ − μ^π_∅) + ω (μ_c − μ_∅) is `guidance_mix([image, uncond, cond], [ω_t, ω])`. Sums are float32
    whatever the dtype (float64 for float64) and rounded once. While every scale so far is exactly 1 the sum is p_i
    itself, per sample where scales are: with ω_t = 1 Gen-1's form is classifier-free guidance to the bit, and on the
    CPU and in float32 that is `uncond + ω * (cond − uncond)` as PyTorch computes it, to the bit. (A scale of 1 that
    comes after another one cannot telescope, and is added like any other.)

    Linear in the predictions, and differentiable in them any number of times. With a rescale, or where a scale
    requires a gradient, a call that needs gradients is served by the reference. On tensors of less than some 50 000
    numbers checks and calls (about 10 µs) outweigh what one pass saves over the expression written out.

    Args:
        predictions: n + 1 ≥ 2 tensors `[B, …]` of one shape, dtype and device: float32, bfloat16, float16 or float64,
            any strides. Tensors that lie densely and alike in memory, permuted or not, are not copied.
        scales: n scales, each a number or a tensor `[B]`.
        rescale: φ in [0, 1]: mix · (φ · std(pₙ) / std(mix) + 1 − φ), deviations over all but the batch dimension,
            against overexposure at large scales.
        backend: `"auto"`, or the name of one, which then never falls back: `"reference"`, `"native"` (C++, CPU
            tensors), `"triton"` (GPU tensors; up to four predictions, no float64, no rescale).

    Returns:
        `[B, …]` in the dtype of the predictions.

    Raises:
        ArgumentError: if an argument does not fit; names it, what was given and what is accepted.
        BackendUnavailableError: if the named backend cannot run here.

    "Structure and Content-Guided Video Synthesis with Diffusion Models" (Gen-1), equations 8 and 9; the rescale is
    that of "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4, as diffusers has it.

    Examples:
        >>> uncond, cond = torch.zeros(1, 3), torch.ones(1, 3)
        >>> cvg.guidance_mix([uncond, cond], [7.5])
        tensor([[7.5000, 7.5000, 7.5000]])
    """
    predictions = normalize_tensors("predictions", predictions)
    try:
        scales = list(scales)
    except TypeError as error:
        raise ArgumentError(f"scales must be a sequence of numbers or tensors [B], got {described(scales)}") from error
    _check(predictions, scales, rescale)
    numbers, per_sample = _split(predictions[0], scales)
    device = predictions[0].device
    backend = backend_under_transforms("guidance_mix", backend, (*predictions, per_sample), kernels=())
    backend = backend_on("guidance_mix", backend, device)
    steps = numbers if per_sample is None else per_sample
    if backend is Backend.REFERENCE:
        return _reference(predictions, steps, rescale)
    if _needs_reference(predictions, per_sample, rescale):
        if backend is not Backend.AUTO:
            raise ArgumentError(
                "rescale, and scales that require a gradient, are differentiated by backend 'reference' only; "
                f"got backend {backend.value!r}"
            )
        return _reference(predictions, steps, rescale)
    # Nothing to record: the kernel is called as it is, since torch's dispatch costs as much as a small mix.
    plain = not torch.compiler.is_compiling() and all(type(p) is torch.Tensor for p in predictions)
    if plain and device.type != "meta" and not _needs_grad(predictions):
        return _mix(predictions, numbers, per_sample, float(rescale), backend.value)
    return _mix_op(predictions, numbers, per_sample, float(rescale), backend.value)


def _check(predictions: list[torch.Tensor], scales: Sequence, rescale: float) -> None:
    """Checks what can be checked without reading a tensor."""
    if len(predictions) < 2:
        raise ArgumentError(f"predictions must be at least two tensors, got {len(predictions)}")
    first = predictions[0]
    for number, tensor in enumerate(predictions):
        if tensor.dtype not in _DTYPES or tensor.ndim < 1 or tensor.layout is not torch.strided:
            raise ArgumentError(
                f"predictions[{number}] must be float32, bfloat16, float16 or float64 [B, …], got {described(tensor)}"
            )
        if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
            raise ArgumentError(
                f"predictions[{number}] must be as predictions[0] ({tuple(first.shape)}, {first.dtype}, "
                f"{first.device}), got {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"
            )
    if len(scales) != len(predictions) - 1:
        raise ArgumentError(f"scales must be one fewer than the {len(predictions)} predictions, got {len(scales)}")
    if not 0 <= normalize_number("rescale", rescale) <= 1:
        raise ArgumentError(f"rescale must lie in [0, 1], got {rescale!r}")
    if rescale and first.shape[1:].numel() == 1:
        raise ArgumentError(f"rescale must be 0 for samples of one number, which do not deviate, got {rescale!r}")


def _split(
    first: torch.Tensor, scales: Sequence[float | torch.Tensor]
) -> tuple[list[float] | None, torch.Tensor | None]:
    """Scales as numbers, or, if one is a tensor, all of them as a tensor `[n, B]`; the other is `None`."""
    if not any(isinstance(scale, torch.Tensor) for scale in scales):
        wanted = "a number or a tensor [B]"
        return [normalize_number(f"scales[{n}]", one, wanted) for n, one in enumerate(scales)], None
    batch, wide = first.shape[0], torch.promote_types(first.dtype, torch.float32)
    rows = []
    for number, scale in enumerate(scales):
        if not isinstance(scale, torch.Tensor):
            given = normalize_number(f"scales[{number}]", scale, "a number or a tensor [B]")
            scale = torch.full((batch,), given, dtype=wide, device=first.device)
        if scale.shape != (batch,):
            raise ArgumentError(
                f"scales[{number}] must be a number or a tensor [B] = {(batch,)}, got {tuple(scale.shape)}"
            )
        rows.append(scale.to(first.device, wide))
    return None, torch.stack(rows)


def _needs_reference(predictions, per_sample: torch.Tensor | None, rescale: float) -> bool:
    """Whether a gradient is wanted that only the reference has."""
    by_scales = per_sample is not None and _needs_grad([per_sample])
    return by_scales or (bool(rescale) and _needs_grad(predictions))


def _needs_grad(tensors: list[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _reference(predictions, steps, rescale: float) -> torch.Tensor:
    note_backend("guidance_mix", "reference")
    mix = reference.guidance_mix(predictions, steps, rescale=rescale)
    # Where the sum telescopes the reference gives a prediction back as it is.
    return mix.clone() if any(mix is tensor for tensor in predictions) else mix


# --- registration ----------------------------------------------------------------------------------------------------

torch.library.define(
    "cvg_kernels::guidance_mix",
    "(Tensor[] predictions, float[]? scales, Tensor? sample_scales, float rescale, str backend) -> Tensor",
)
_mix_op = torch.ops.cvg_kernels.guidance_mix.default


def _mix(predictions, scales, sample_scales, rescale, backend):
    out = torch.empty_like(predictions[0])
    # Kernels walk through memory, one sample after the other, all tensors alike.
    samples_apart = out.shape[0] == 1 or out.stride(0) * out.shape[0] == out.numel()
    mix = out if samples_apart else torch.empty_like(out, memory_format=torch.contiguous_format)
    alike = [
        tensor if tensor.stride() == mix.stride() else torch.empty_like(mix).copy_(tensor) for tensor in predictions
    ]
    run_kernel(
        "guidance_mix",
        backend,
        Facts(out.device, out.dtype, predictions=len(predictions), rescale=bool(rescale)),
        lambda module: mix.numel() and module.forward(alike, scales, sample_scales, rescale, mix),
    )
    return out if samples_apart else out.copy_(mix)


torch.library.impl("cvg_kernels::guidance_mix", ("cpu", "cuda"), _mix)


@torch.library.register_fake("cvg_kernels::guidance_mix")
def _mix_fake(predictions, scales, sample_scales, rescale, backend):
    return torch.empty_like(predictions[0])


def _remember(ctx, inputs, output) -> None:
    predictions, scales, sample_scales, _, _ = inputs
    ctx.count, ctx.scales = len(predictions), scales
    ctx.save_for_backward(sample_scales)


def _differentiate(ctx, grad):
    """A linear map: its gradient is a scaling, w_i = s_i − s_{i+1} with s₀ = 1 and s_{n+1} = 0."""
    (sample_scales,) = ctx.saved_tensors
    if sample_scales is None:
        steps = [1.0, *ctx.scales, 0.0]
        grads = [(left - right) * grad for left, right in zip(steps, steps[1:], strict=False)]
        return grads, None, None, None, None
    ones, zeros = torch.ones_like(sample_scales[:1]), torch.zeros_like(sample_scales[:1])
    steps = torch.cat([ones, sample_scales, zeros])
    weights = (steps[:-1] - steps[1:]).view(ctx.count, -1, *[1] * (grad.ndim - 1))
    return [(weight * grad).to(grad.dtype) for weight in weights], None, None, None, None


register_autograd("cvg_kernels::guidance_mix", _differentiate, setup_context=_remember)
