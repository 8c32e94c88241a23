"""Torch's own fused attention operators, which return the log-sum-exp: one form for all of them.

They are private operators of torch. Each is used only where its schema is the one written here, and once its numbers
have been compared with plain attention on this device (`unfit`). They differ in the shape of their log-sum-exp:

    operator      devices           log-sum-exp
    cpu flash     CPU               [B, H, N], not contiguous
    cudnn         sm_80 and newer   [B, H, N, 1]
    flash         sm_80 and newer   [B, H, N]
    efficient     sm_50 and newer   [B, H, ⌈N/32⌉·32], the rest +∞
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad

from cvg_kernels.ops._autocast import autocast_off
from cvg_kernels.reference import attention as reference

_HALVES = (torch.bfloat16, torch.float16)

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class FusedOperator:
    """One of torch's operators.

    Attributes:
        name: as in `torch.ops.aten`, without its common beginning.
        schema: signature of the forward operator, from its first parenthesis.
        backward_schema: signature of the backward operator.
        dtypes: that it takes.
        multiple: of which the head dimension must be one.
        max_head_dim: the largest head dimension.
        enabled: whether the user lets torch use it.
        forward: (query, key, value, scale) → out, log-sum-exp `[B, H, N]`.
        backward: (grad_out, query, key, value, out, lse, scale) → gradients of query, key and value.
    """

    name: str
    schema: str
    backward_schema: str
    dtypes: tuple[torch.dtype, ...]
    multiple: int
    max_head_dim: int
    enabled: Callable[[], bool]
    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]

    def takes(self, query: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether the operator computes attention of this dtype and these head dimensions."""
        dim = query.shape[-1]
        fits = dim == value.shape[-1] and dim % self.multiple == 0 and dim <= self.max_head_dim
        return fits and query.dtype in self.dtypes and self.enabled()


def _operator(name: str):
    return getattr(torch.ops.aten, f"_scaled_dot_product_{name}")


def _cpu_forward(query, key, value, scale):
    out, lse = _operator("flash_attention_for_cpu")(query, key, value, scale=scale)
    return out, lse


def _cpu_backward(grad_out, query, key, value, out, lse, scale):
    backward = _operator("flash_attention_for_cpu_backward")
    return backward(grad_out, query, key, value, out, lse, 0.0, False, scale=scale)


def _cudnn_forward(query, key, value, scale):
    out, lse, *_ = _operator("cudnn_attention")(query, key, value, None, True, scale=scale)
    return out, lse.view(query.shape[:3])


def _cudnn_backward(grad_out, query, key, value, out, lse, scale):
    seed = query.new_zeros((), dtype=torch.int64)  # without dropout nothing reads it
    return _operator("cudnn_attention_backward")(
        grad_out,
        query,
        key,
        value,
        out,
        lse[..., None],
        seed,
        seed,
        None,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        False,
        scale=scale,
    )


def _flash_forward(query, key, value, scale):
    out, lse, *_ = _operator("flash_attention")(query, key, value, scale=scale)
    return out, lse


def _flash_backward(grad_out, query, key, value, out, lse, scale):
    seed = query.new_zeros(2, dtype=torch.uint64)  # without dropout nothing reads it
    return _operator("flash_attention_backward")(
        grad_out,
        query,
        key,
        value,
        out,
        lse,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        False,
        seed,
        seed[:0],
        scale=scale,
    )


def _efficient_forward(query, key, value, scale):
    out, lse, *_ = _operator("efficient_attention")(query, key, value, None, True, scale=scale)
    return out, lse[..., : query.shape[2]]


def _efficient_backward(grad_out, query, key, value, out, lse, scale):
    seed = query.new_zeros((), dtype=torch.int64)  # without dropout nothing reads it
    lse = pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    wanted = [True, True, True, False]
    return _operator("efficient_attention_backward")(
        grad_out, query, key, value, None, out, lse, seed, seed, 0.0, wanted, False, scale=scale
    )[:3]


_CPU = FusedOperator(
    "flash_attention_for_cpu",
    "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, *, Tensor? attn_mask=None, "
    "float? scale=None) -> (Tensor output, Tensor logsumexp)",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, float dropout_p, "
    "bool is_causal, *, Tensor? attn_mask=None, float? scale=None) -> (Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value)",
    (torch.float32, torch.float64, *_HALVES),
    1,
    256,
    lambda: True,
    _cpu_forward,
    _cpu_backward,
)
_CUDNN = FusedOperator(
    "cudnn_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0., "
    "bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, "
    "Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, Tensor philox_seed, Tensor philox_offset, "
    "Tensor debug_attn_mask)",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor philox_seed, "
    "Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, "
    "float dropout_p, bool is_causal, *, float? scale=None) -> (Tensor, Tensor, Tensor)",
    _HALVES,
    8,
    128,
    torch.backends.cuda.cudnn_sdp_enabled,
    _cudnn_forward,
    _cudnn_backward,
)
_FLASH = FusedOperator(
    "flash_attention",
    "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, bool return_debug_mask=False, "
    "*, float? scale=None) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, "
    "SymInt max_k, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, "
    "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor philox_seed, "
    "Tensor philox_offset, *, float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _HALVES,
    8,
    256,
    torch.backends.cuda.flash_sdp_enabled,
    _flash_forward,
    _flash_backward,
)
_EFFICIENT = FusedOperator(
    "efficient_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0., "
    "bool is_causal=False, *, float? scale=None) -> (Tensor output, Tensor log_sumexp, Tensor philox_seed, "
    "Tensor philox_offset)",
    "(Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor attn_bias, Tensor out, Tensor logsumexp, "
    "Tensor philox_seed, Tensor philox_offset, float dropout_p, bool[4] grad_input_mask, bool is_causal=False, *, "
    "float? scale=None) -> (Tensor, Tensor, Tensor, Tensor)",
    (torch.float32, *_HALVES),
    8,
    256,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    _efficient_forward,
    _efficient_backward,
)


def operators_of(device: torch.device) -> tuple[FusedOperator, ...]:
    """The operators of a device, the fastest first: cuDNN's leads on Hopper and Blackwell's data centre cards."""
    if device.type == "cpu":
        return (_CPU,)
    if device.type != "cuda":
        return ()
    if torch.version.hip is None and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0)):
        return (_CUDNN, _FLASH, _EFFICIENT)
    return (_FLASH, _EFFICIENT)


def operator_for(query: torch.Tensor, value: torch.Tensor) -> FusedOperator | None:
    """The first operator that serves a call on this device, or `None`."""
    for operator in operators_of(query.device):
        if operator.takes(query, value) and unfit(operator, query.device, query.dtype) is None:
            return operator
    return None


def unfit(operator: FusedOperator, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an operator must not be used, or `None`: its schema is another one, or its numbers are wrong.

    Asked for the first time, it runs the operator and waits for the device.
    """
    found, case = _verdicts(), (operator.name, device, dtype)
    if case not in found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "it was not tried before the capture of a CUDA graph began"
        found[case] = _other_schema(operator) or _wrong_numbers(operator, device, dtype)
    return found[case]


@lru_cache(1)
def _verdicts() -> dict[tuple[str, torch.device, torch.dtype], str | None]:
    """What `unfit` found out in this process."""
    return {}


def _other_schema(operator: FusedOperator) -> str | None:
    wanted = ((operator.name, operator.schema), (f"{operator.name}_backward", operator.backward_schema))
    for name, schema in wanted:
        packet = getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None)
        if packet is None:
            return f"torch {torch.__version__} has no operator {name}"
        found = str(packet.default._schema)
        if found[found.index("(") :] != schema:
            return f"torch {torch.__version__} has another schema of {name}: {found}"
    return None


def _wrong_numbers(operator: FusedOperator, device: torch.device, dtype: torch.dtype) -> str | None:
    """Compares the operator with plain attention on a small input, laid out as diffusers has it."""
    generator = torch.Generator().manual_seed(0)

    def given(length: int) -> torch.Tensor:
        numbers = torch.randn(1, length, 2, 64, generator=generator, dtype=torch.float64)
        return numbers.to(device, dtype).transpose(1, 2)

    scale = 0.2
    # Without autograd, whose hooks (of checkpointing, say) are the caller's, and whatever other modes the caller is
    # in.
    with torch.inference_mode(False), torch.no_grad(), autocast_off(device):
        query, key, value, grad_out = given(67), given(83), given(83), given(67)
        wide = [tensor.double() for tensor in (query, key, value)]
        attended = reference.attention_with_capture(*wide, None, scale=scale)
        exact = [attended.out, attended.lse]
        exact += reference.attention_with_capture_backward(grad_out.double(), None, None, *wide, None, scale=scale)[:3]
        try:
            out, lse = operator.forward(query, key, value, scale)
            grads = operator.backward(grad_out, query, key, value, out, lse, scale)
        except RuntimeError as error:
            return f"it fails on {device}: {str(error).splitlines()[0]}"
    # 16 bits: a few roundings of the result, and of P before its product. Else: sums of a hundred terms in other
    # orders, and exponentials by polynomials. Errors of layout are of the size of the result.
    allowed = (8 if dtype in _HALVES else 1000) * torch.finfo(dtype).eps
    for name, have, want in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), exact, strict=True):
        error = (have.double() - want).abs().max() / want.abs().max()
        if not error <= allowed:
            return f"its {name} is off by {error:.2g} in {dtype} on {device}, where {allowed:.2g} is allowed"
    return None
