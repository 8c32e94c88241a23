"""The min-max product that path flow is made of: the public function, its checks, and its registration with torch."""

from __future__ import annotations

import torch

from cvg_kernels.backends import Backend
from cvg_kernels.errors import ArgumentError, check_flag
from cvg_kernels.kernels import Facts
from cvg_kernels.ops._choice import run_kernel
from cvg_kernels.ops._registration import backend_on, forbid_double_backward
from cvg_kernels.ops._trace import note_backend, register_autograd
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate_given import check_floating
from cvg_kernels.ops._validate_temperature import check_temperature
from cvg_kernels.reference import min_max_matmul as reference


def min_max_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    temperature: float | None = None,
    *,
    correct_bias: bool = False,
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """The min-max product (A ⊙ B)_ij = max_r min(A_ir, B_rj): the widest one-node path from i to j.

    Args:
        a: `[B, X, R]`.
        b: `[B, R, Y]`.
        temperature: `None` for the hard form. T > 0 for the soft form, with maximum T log Σ exp(·/T) and minimum
            likewise, exact for any T (a running maximum is kept); it differs from the hard form by at most
            T · (ln R + ln 2).
        correct_bias: subtract T · (ln R − ln 2) from the soft form, which it adds to edges that are all equal: it then
            lies between T · ln R below the hard form and T · ln 2 above, nearer to it where edges differ by less than
            T.
        backend: as for `path_flow`.

    Returns:
        `[B, X, Y]`, with gradients as those of `path_flow`.

    Raises:
        ArgumentError: if an argument does not fit.
        BackendUnavailableError: if the named backend cannot run here.

    Definition 2 of "Compositional Video Generation as Flow Equalization" (Vico).

    Examples:
        >>> a, b = torch.tensor([[[0.2, 0.9]]]), torch.tensor([[[0.5], [0.7]]])
        >>> cvg.min_max_matmul(a, b)
        tensor([[[0.7000]]])
    """
    check_floating("a", a, "[B, X, R]", 3)
    check_floating("b", b, "[B, R, Y]", 3)
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1] or a.shape[2] == 0:
        raise ArgumentError(
            f"a [B, X, R] and b [B, R, Y] must agree in B and R ≥ 1, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if (a.dtype, a.device) != (b.dtype, b.device):
        raise ArgumentError(
            f"b must have the dtype and device of a ({a.dtype}, {a.device}), got {b.dtype}, {b.device}"
        )
    check_temperature(temperature)
    check_flag("correct_bias", correct_bias)
    backend = backend_under_transforms("min_max_matmul", backend, (a, b))
    backend = backend_on("min_max_matmul", backend, a.device)
    if backend is Backend.REFERENCE:
        note_backend("min_max_matmul", "reference")
        return reference.min_max_matmul(a, b, temperature, correct_bias)
    flow = _forward_op(a, b, temperature, backend.value)
    return flow - reference.soft_bias(temperature, a.shape[2]) if correct_bias else flow


# --- registration ----------------------------------------------------------------------------------------------------

torch.library.define("cvg_kernels::min_max_matmul", "(Tensor a, Tensor b, float? temperature, str backend) -> Tensor")
torch.library.define(
    "cvg_kernels::min_max_matmul_backward",
    "(Tensor grad, Tensor a, Tensor b, float? temperature, bool need_a, bool need_b, str backend) "
    "-> (Tensor grad_a, Tensor grad_b)",
)

_forward_op = torch.ops.cvg_kernels.min_max_matmul.default
_backward_op = torch.ops.cvg_kernels.min_max_matmul_backward.default


@torch.library.impl("cvg_kernels::min_max_matmul", ("cpu", "cuda"))
def _forward(a, b, temperature, backend):
    return run_kernel(
        "min_max_matmul", backend, Facts(a.device, a.dtype), lambda module: module.forward(a, b, temperature)
    )


@torch.library.register_fake("cvg_kernels::min_max_matmul")
def _forward_fake(a, b, temperature, backend):
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


@torch.library.impl("cvg_kernels::min_max_matmul_backward", ("cpu", "cuda"))
def _backward(grad, a, b, temperature, need_a, need_b, backend):
    grads = run_kernel(
        "min_max_matmul_backward",
        backend,
        Facts(a.device, a.dtype),
        lambda module: module.backward(grad, a, b, temperature, need_a, need_b),
    )
    return tuple(a.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("cvg_kernels::min_max_matmul_backward")
def _backward_fake(grad, a, b, temperature, need_a, need_b, backend):
    return a.new_empty(a.shape if need_a else (0,)), b.new_empty(b.shape if need_b else (0,))


def _remember(ctx, inputs, output) -> None:
    a, b, *ctx.options = inputs
    ctx.save_for_backward(a, b)


def _differentiate(ctx, grad):
    need_a, need_b = ctx.needs_input_grad[:2]
    temperature, backend = ctx.options
    grad_a, grad_b = _backward_op(grad, *ctx.saved_tensors, temperature, need_a, need_b, backend)
    return grad_a if need_a else None, grad_b if need_b else None, None, None


register_autograd("cvg_kernels::min_max_matmul", _differentiate, setup_context=_remember)
forbid_double_backward("min_max_matmul")
