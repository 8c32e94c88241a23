"""Min-max path flow: public functions and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from cvg_kernels.backends import Backend, parse_backend, require
from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops._trace import note_backend
from python_ref import path_flow as reference

Residual = Literal["average", "add"]


def min_max_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    temperature: float | None = None,
    *,
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """The min-max product (A ⊙ B)_ij = max_r min(A_ir, B_rj): the widest one-node path from i to j.

    Args:
        a: `[B, X, R]`.
        b: `[B, R, Y]`.
        temperature: `None` for the hard form. T > 0 for the soft form, with maximum T log Σ exp(·/T) and minimum
            likewise, exact for any T (a running maximum is kept); it differs from the hard form by at most
            T · (ln R + ln 2).
        backend: `"auto"` or `"reference"`.

    Returns:
        `[B, X, Y]`.

    Raises:
        ArgumentError: if an argument does not fit.
        BackendUnavailableError: if the named backend cannot run here.

    Definition 2 of "Compositional Video Generation as Flow Equalization" (Vico).
    """
    for name, tensor in (("a", a), ("b", b)):
        if tensor.ndim != 3 or not tensor.is_floating_point():
            raise ArgumentError(
                f"{name} must be floating point with 3 dimensions, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1] or a.shape[2] == 0:
        raise ArgumentError(
            f"a [B, X, R] and b [B, R, Y] must agree in B and R ≥ 1, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    _check_temperature(temperature)
    _choose("path_flow", backend, a.device)
    return reference.min_max_matmul(a, b, temperature)


def path_flow(
    cross: torch.Tensor,
    temporal: Sequence[torch.Tensor],
    *,
    temperature: float | None = None,
    residual: Residual | None = "average",
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """Flow of each token to each output frame along its widest path, at every position.

        flow = T_n ⊙ … ⊙ T_1 ⊙ X,   (A ⊙ B)_ij = max_r min(A_ir, B_rj)

    with X the cross-attention maps and T_i the temporal attention that follows, skip connections mixed in. It is a lower
    bound of the maximum flow through the same graph.

    Args:
        cross: `[B, K, F, L]`: attention of position L of frame F to token K.
        temporal: hops `[B, L, F, F]` (row = attending frame), first hop first; may be empty.
        temperature: `None` for the hard form; T > 0 for the soft form, which differs by at most
            T · len(temporal) · (ln F + ln 2).
        residual: `"average"` is (A+I)/2, `"add"` is A+I, `None` is A.
        backend: `"auto"` or `"reference"`.

    Returns:
        `[B, K, F, L]`, differentiable twice.

    Raises:
        ArgumentError: if an argument does not fit.
        BackendUnavailableError: if the named backend cannot run here.

    "Compositional Video Generation as Flow Equalization" (Vico); its released code averages the residual, its paper adds.
    """
    if cross.ndim != 4 or not cross.is_floating_point():
        raise ArgumentError(
            f"cross must be floating point [B, K, F, L], got {cross.dtype} {tuple(cross.shape)}"
        )
    batch, _, frames, positions = cross.shape
    for number, hop in enumerate(temporal):
        if tuple(hop.shape) != (batch, positions, frames, frames):
            raise ArgumentError(
                f"temporal[{number}] must have shape [B, L, F, F] = {(batch, positions, frames, frames)}, got "
                f"{tuple(hop.shape)}"
            )
        if (hop.dtype, hop.device) != (cross.dtype, cross.device):
            raise ArgumentError(
                f"temporal[{number}] must have the dtype and device of cross ({cross.dtype}, {cross.device}), got "
                f"{hop.dtype}, {hop.device}"
            )
    if residual not in ("average", "add", None):
        raise ArgumentError(f"residual must be 'average', 'add' or None, got {residual!r}")
    _check_temperature(temperature)
    _choose("path_flow", backend, cross.device)
    return reference.path_flow(cross, temporal, temperature=temperature, residual=residual)


def _check_temperature(temperature: float | None) -> None:
    if temperature is not None and not temperature > 0:
        raise ArgumentError(f"temperature must be None or positive, got {temperature!r}")


def _choose(operation: str, backend: str | Backend, device: torch.device) -> None:
    """Checks a backend by name; the reference is what `auto` means here."""
    chosen = parse_backend(backend)
    if chosen is not Backend.AUTO:
        require(operation, chosen, device)
    note_backend(operation, "reference")
