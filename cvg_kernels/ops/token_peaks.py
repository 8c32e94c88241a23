"""Vico's score of each token: the public function and its checks."""

from __future__ import annotations

import torch

from cvg_kernels.backends import Backend, parse_backend, require
from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops._trace import note_backend
from python_ref import token_peaks as reference


def token_peaks(
    flow: torch.Tensor,
    *,
    sharpness: float = 100.0,
    sigma: float = 0.5,
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """How clearly each token owns some place and moment:  A_k = max (G ∗ softmax_K(sharpness · flow))_k.

    G is a 3×3×3 Gaussian over frames, rows and columns with taps exp(−(x/2σ)²), reflected at the ends.

    Args:
        flow: `[B, K, F, h, w]`, floating point.
        sharpness: factor before the softmax over the K tokens.
        sigma: width of the Gaussian, positive.
        backend: `"auto"` or `"reference"`.

    Returns:
        `[B, K]` in [0, 1].

    Raises:
        ArgumentError: if an argument does not fit.
        BackendUnavailableError: if the named backend cannot run here.

    Released code of "Compositional Video Generation as Flow Equalization" (Vico), after Attend-and-Excite.
    """
    if flow.ndim != 5 or not flow.is_floating_point() or 0 in flow.shape[1:]:
        raise ArgumentError(
            f"flow must be floating point [B, K, F, h, w] without empty dimensions, got {flow.dtype} "
            f"{tuple(flow.shape)}"
        )
    if not sigma > 0:
        raise ArgumentError(f"sigma must be positive, got {sigma!r}")
    chosen = parse_backend(backend)
    if chosen is not Backend.AUTO:
        require("token_peaks", chosen, flow.device)
    note_backend("token_peaks", "reference")
    return reference.token_peaks(flow, sharpness=sharpness, sigma=sigma)
