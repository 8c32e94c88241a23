"""Min-max path flow: the public function, its checks, and its registration with torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from cvg_kernels.backends import Backend
from cvg_kernels.errors import ArgumentError, check_flag
from cvg_kernels.kernels import Facts
from cvg_kernels.ops._choice import run_kernel
from cvg_kernels.ops._registration import backend_on, forbid_double_backward
from cvg_kernels.ops._trace import note_backend, register_autograd
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate_given import check_floating, normalize_tensors
from cvg_kernels.ops._validate_temperature import check_temperature
from cvg_kernels.ops.min_max_matmul import min_max_matmul
from cvg_kernels.reference import min_max_matmul as product_reference
from cvg_kernels.reference import path_flow as reference

Residual = Literal["average", "add"]
Order = Literal["tokens_first", "hops_first"]


def path_flow(
    cross: torch.Tensor,
    temporal: Sequence[torch.Tensor],
    *,
    temperature: float | None = None,
    residual: Residual | None = "average",
    spatial: torch.Tensor | None = None,
    correct_bias: bool = False,
    order: Order = "tokens_first",
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """Flow of each token to each output frame along its widest path, at every position.

        flow = T_n ⊙ … ⊙ T_1 ⊙ (S ⊙) X,   (A ⊙ B)_ij = max_r min(A_ir, B_rj)

    with X the cross-attention maps, T_i the temporal attention that follows and, if given, S the attention within each
    frame between the two; skip connections mixed in. It is a lower bound of the maximum flow through the same graph.

    Args:
        cross: `[B, K, F, L]`: attention of position L of frame F to token K.
        temporal: hops `[B, L, F, F]` (row = attending frame), first hop first; may be empty.
        temperature: `None` for the hard form; T > 0 for the soft form, which differs by at most
            T · len(temporal) · (ln F + ln 2), and T · (ln L + ln 2) more with `spatial`.
        residual: `"average"` is (A+I)/2, `"add"` is A+I, `None` is A.
        spatial: hop `[B, F, L, L]` (row = attending position) before the temporal ones, by `min_max_matmul`: F · L² ·
            K comparisons, so for the coarse levels of a network.
        correct_bias: subtract after every soft product what it adds to equal edges, see `min_max_matmul`.
        order: what is multiplied first. The hard form is the same in either; the soft product is not associative.
            `"tokens_first"`, T_n ⊙ (… ⊙ (T_1 ⊙ X)), follows each token through the network and keeps nothing between
            the hops: n · F² · K comparisons a position. `"hops_first"`, (T_n ⊙ (… ⊙ T_1)) ⊙ X, is the order of Vico's
            released code, whose numbers need it: at T = 0.01 the two flows differ by up to 0.02. It takes (n − 1) · F³
            + F² · K comparisons and a product as large as a hop; for two hops it is the faster one where tokens
            outnumber frames (on a CPU two thirds of the time at 77 tokens and 16 frames) and up to a third slower
            where they are few.
        backend: `"auto"`; `"reference"`, `"native"` (C++, float32 and float64 CPU tensors) or `"triton"` (float32 GPU
            tensors), which then never falls back.

    Returns:
        `[B, K, F, L]`. Where widest paths tie they share the gradient evenly, and so do the two edges of a pair that
        tie. The kernels give first derivatives; the reference can be differentiated twice.

    Raises:
        ArgumentError: if an argument does not fit.
        BackendUnavailableError: if the named backend cannot run here.

    "Compositional Video Generation as Flow Equalization" (Vico); its released code averages the residual, its paper
    adds.

    Examples:
        >>> cross = torch.tensor([0.25, 0.75]).view(1, 1, 2, 1)  # a word is seen in the second of two frames
        >>> hop = torch.tensor([[[[0.5, 0.5], [0.0, 1.0]]]])  # the first frame attends to the second
        >>> cvg.path_flow(cross, [hop], residual=None).flatten()
        tensor([0.5000, 0.7500])
    """
    check_floating("cross", cross, "[B, K, F, L]", 4)
    temporal = normalize_tensors("temporal", temporal)
    batch, _, frames, positions = cross.shape
    if frames == 0:
        raise ArgumentError(f"cross must have at least one frame, got {tuple(cross.shape)}")
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
    if order not in ("tokens_first", "hops_first"):
        raise ArgumentError(f"order must be 'tokens_first' or 'hops_first', got {order!r}")
    check_temperature(temperature)
    check_flag("correct_bias", correct_bias)
    if spatial is not None:
        check_floating("spatial", spatial, "[B, F, L, L]", 4)
    backend = backend_under_transforms(
        "path_flow", backend, (cross, spatial, *temporal), kernels=()
    )  # vmap cannot split its list of hops
    if spatial is not None:
        cross = _spatial_hop(cross, spatial, temperature, residual, correct_bias, backend)
    backend = backend_on("path_flow", backend, cross.device)
    if backend is Backend.REFERENCE:
        note_backend("path_flow", "reference")
        return reference.path_flow(
            cross, temporal, temperature=temperature, residual=residual, correct_bias=correct_bias, order=order
        )
    if order == "hops_first" and len(temporal) > 1:
        temporal = [_product_of(temporal, temperature, residual, correct_bias, backend)]
        residual = None  # it holds the skip connections
    return _through(cross, temporal, temperature, residual, correct_bias, backend)


def _through(cross, temporal, temperature, residual, correct_bias, backend) -> torch.Tensor:
    """T_n ⊙ (… ⊙ (T_1 ⊙ X)) by the kernels of a backend."""
    bias = product_reference.soft_bias(temperature, cross.shape[2]) if correct_bias else 0.0
    # min(A, x − c) = min(A + c, x) − c: what is due after each product can wait to the end if the later edges rise.
    if bias:
        whole = 0.5 if residual == "average" else 1.0  # of an edge, that is attention
        temporal = [hop + number * bias / whole for number, hop in enumerate(temporal)]
    flow = _forward_op(cross, list(temporal), temperature, residual, backend.value)
    return flow - len(temporal) * bias if bias else flow


def _product_of(temporal, temperature, residual, correct_bias, backend) -> torch.Tensor:
    """T_n ⊙ (… ⊙ T_1), `[B, L, F, F]`: the flow of the first hop's columns, as if they were tokens, through the
    others.
    """
    columns = reference.residual_hop(temporal[0], residual).permute(0, 3, 2, 1)  # [B, F, F, L]
    product = _through(columns, temporal[1:], temperature, residual, correct_bias, backend)
    return product.permute(0, 3, 2, 1)


def _spatial_hop(cross, spatial, temperature, residual, correct_bias, backend) -> torch.Tensor:
    """S ⊙ X in every frame."""
    batch, _, frames, positions = cross.shape
    wanted = (batch, frames, positions, positions)
    if tuple(spatial.shape) != wanted or spatial.dtype != cross.dtype:
        raise ArgumentError(
            f"spatial must be {cross.dtype} with shape [B, F, L, L] = {wanted}, got {spatial.dtype} "
            f"{tuple(spatial.shape)}"
        )
    if positions == 0:
        return cross
    hop = reference.residual_hop(spatial, residual).flatten(0, 1)  # [B·F, L, L]
    tokens = cross.permute(0, 2, 3, 1).flatten(0, 1)  # [B·F, L, K]
    flow = min_max_matmul(hop, tokens, temperature, correct_bias=correct_bias, backend=backend)
    return flow.unflatten(0, (batch, frames)).permute(0, 3, 1, 2)


# --- registration ----------------------------------------------------------------------------------------------------

torch.library.define(
    "cvg_kernels::path_flow",
    "(Tensor cross, Tensor[] temporal, float? temperature, str? residual, str backend) -> Tensor",
)
torch.library.define(
    "cvg_kernels::path_flow_backward",
    "(Tensor grad, Tensor cross, Tensor[] temporal, float? temperature, str? residual, bool[] need_temporal, "
    "str backend) -> (Tensor grad_cross, Tensor[] grad_temporal)",
)

_forward_op = torch.ops.cvg_kernels.path_flow.default
_backward_op = torch.ops.cvg_kernels.path_flow_backward.default


@torch.library.impl("cvg_kernels::path_flow", ("cpu", "cuda"))
def _forward(cross, temporal, temperature, residual, backend):
    return run_kernel(
        "path_flow",
        backend,
        Facts(cross.device, cross.dtype),
        lambda module: module.forward(cross, temporal, temperature, residual),
    )


@torch.library.register_fake("cvg_kernels::path_flow")
def _forward_fake(cross, temporal, temperature, residual, backend):
    return cross.new_empty(cross.shape)


@torch.library.impl("cvg_kernels::path_flow_backward", ("cpu", "cuda"))
def _backward(grad, cross, temporal, temperature, residual, need_temporal, backend):
    grad_cross, grad_temporal = run_kernel(
        "path_flow_backward",
        backend,
        Facts(cross.device, cross.dtype),
        lambda module: module.backward(grad, cross, temporal, temperature, residual, need_temporal),
    )
    # `None` cannot be returned by an operation: what was not computed is an empty tensor.
    return grad_cross, [cross.new_empty(0) if hop is None else hop for hop in grad_temporal]


@torch.library.register_fake("cvg_kernels::path_flow_backward")
def _backward_fake(grad, cross, temporal, temperature, residual, need_temporal, backend):
    return cross.new_empty(cross.shape), [
        cross.new_empty(hop.shape if need else (0,)) for hop, need in zip(temporal, need_temporal, strict=True)
    ]


def _remember(ctx, inputs, output) -> None:
    cross, temporal, *ctx.options = inputs
    ctx.save_for_backward(cross, *temporal)


def _differentiate(ctx, grad):
    cross, *temporal = ctx.saved_tensors
    temperature, residual, backend = ctx.options
    need_temporal = list(ctx.needs_input_grad[1])
    grad_cross, grad_temporal = _backward_op(grad, cross, temporal, temperature, residual, need_temporal, backend)
    hops = [hop if need else None for hop, need in zip(grad_temporal, need_temporal, strict=True)]
    return grad_cross, hops, None, None, None


register_autograd("cvg_kernels::path_flow", _differentiate, setup_context=_remember)
forbid_double_backward("path_flow")
