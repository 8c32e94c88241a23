"""Vico's score of each token: the public function, its checks, and its registration with torch."""

from __future__ import annotations

import math

import torch

from cvg_kernels.backends import Backend
from cvg_kernels.errors import ArgumentError
from cvg_kernels.kernels import Facts
from cvg_kernels.ops._choice import run_kernel
from cvg_kernels.ops._registration import backend_on, forbid_double_backward
from cvg_kernels.ops._token_peaks_call import blocks_shape
from cvg_kernels.ops._trace import note_backend, register_autograd
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate_given import check_floating, described, normalize_number
from cvg_kernels.reference import token_peaks as reference


def token_peaks(
    flow: torch.Tensor, *, sharpness: float = 100.0, sigma: float = 0.5, backend: str | Backend = "auto"
) -> torch.Tensor:
    """How clearly each token owns some place and moment:  A_k = max (G ∗ softmax_K(sharpness · flow))_k.

    G is a 3×3×3 Gaussian over frames, rows and columns with taps exp(−(x/2σ)²), reflected at the ends.

    Args:
        flow: `[B, K, F, h, w]`, floating point.
        sharpness: factor before the softmax over the K tokens.
        sigma: width of the Gaussian, positive.
        backend: `"auto"`; `"reference"`, `"native"` (C++, float32 and float64 CPU tensors) or `"triton"` (float32 GPU
            tensors), which then never falls back.

    Returns:
        `[B, K]` in [0, 1]. Places that tie for the maximum share the gradient evenly. The kernels give first
        derivatives; the reference can be differentiated twice.

    Raises:
        ArgumentError: if an argument does not fit.
        BackendUnavailableError: if the named backend cannot run here.

    Released code of "Compositional Video Generation as Flow Equalization" (Vico), after Attend-and-Excite.

    Examples:
        >>> flow = torch.zeros(1, 2, 4, 8, 8)
        >>> flow[:, 0] = 1.0  # the first token has every place
        >>> cvg.token_peaks(flow).round(decimals=2)
        tensor([[1., 0.]])
    """
    layout = "[B, K, F, h, w] without empty dimensions"
    check_floating("flow", flow, layout, 5)
    if 0 in flow.shape[1:]:
        raise ArgumentError(f"flow must be floating point {layout}, got {described(flow)}")
    sharpness, sigma = normalize_number("sharpness", sharpness), normalize_number("sigma", sigma)
    if not math.isfinite(sharpness):
        raise ArgumentError(f"sharpness must be finite, got {sharpness!r}")
    if not sigma > 0:
        raise ArgumentError(f"sigma must be positive, got {sigma!r}")
    backend = backend_under_transforms("token_peaks", backend, (flow,))
    backend = backend_on("token_peaks", backend, flow.device)
    if backend is Backend.REFERENCE:
        note_backend("token_peaks", "reference")
        return reference.token_peaks(flow, sharpness=sharpness, sigma=sigma)
    peaks, *_ = _forward_op(flow, sharpness, sigma, backend.value)
    return peaks


# --- registration ----------------------------------------------------------------------------------------------------
# What the backward pass starts from is returned too; see `_token_peaks_call`.

torch.library.define(
    "cvg_kernels::token_peaks",
    "(Tensor flow, float sharpness, float sigma, str backend) -> (Tensor peaks, Tensor sums, Tensor blocks)",
)
torch.library.define(
    "cvg_kernels::token_peaks_backward",
    "(Tensor grad, Tensor flow, Tensor sums, Tensor blocks, float sharpness, float sigma, str backend) -> Tensor",
)

_forward_op = torch.ops.cvg_kernels.token_peaks.default
_backward_op = torch.ops.cvg_kernels.token_peaks_backward.default


@torch.library.impl("cvg_kernels::token_peaks", ("cpu", "cuda"))
def _forward(flow, sharpness, sigma, backend):
    return run_kernel(
        "token_peaks", backend, Facts(flow.device, flow.dtype), lambda module: module.forward(flow, sharpness, sigma)
    )


@torch.library.register_fake("cvg_kernels::token_peaks")
def _forward_fake(flow, sharpness, sigma, backend):
    peaks, sums = (flow.new_empty(flow.shape[:2]), flow.new_empty((flow.shape[0], 2, *flow.shape[2:])))
    return peaks, sums, flow.new_empty(blocks_shape(flow.shape))


@torch.library.impl("cvg_kernels::token_peaks_backward", ("cpu", "cuda"))
def _backward(grad, flow, sums, blocks, sharpness, sigma, backend):
    return run_kernel(
        "token_peaks_backward",
        backend,
        Facts(flow.device, flow.dtype),
        lambda module: module.backward(grad, flow, sums, blocks, sharpness, sigma),
    )


@torch.library.register_fake("cvg_kernels::token_peaks_backward")
def _backward_fake(grad, flow, sums, blocks, sharpness, sigma, backend):
    return flow.new_empty(flow.shape)


def _remember(ctx, inputs, output) -> None:
    flow, *ctx.options = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(flow, *kept)


def _differentiate(ctx, grad, *_):
    return _backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None, None


register_autograd("cvg_kernels::token_peaks", _differentiate, setup_context=_remember)
forbid_double_backward("token_peaks")
