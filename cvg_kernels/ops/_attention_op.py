"""The attention core as an operation of torch:
its schema, what it gives on fake tensors, its gradient, its backends.
"""

from __future__ import annotations

import torch

from cvg_kernels._layout import dense_like
from cvg_kernels.kernels import Backend
from cvg_kernels.ops._attention_call import AttentionCall, AttentionGrads, AttentionResult, Band, Needed, facts_of
from cvg_kernels.ops._choice import run_kernel
from cvg_kernels.ops._registration import forbid_double_backward
from cvg_kernels.ops._shortcut import directly, somebody_looks, with_shortcut
from cvg_kernels.ops._trace import register_autograd

# `None` cannot be returned by an operation: what was not computed is an empty tensor. A band is five arguments, of
# which the frames are `None` where there is none.
_CALL = (
    "Tensor query, Tensor key, Tensor? value, Tensor? token_ids, Tensor? key_bias, Tensor? token_bias, "
    "Tensor? query_frames, Tensor? key_frames, float sigma, float strength, bool row_max_grad, "
    "float scale, bool head_mean"
)
torch.library.define(
    "cvg_kernels::attention",
    f"({_CALL}, bool deterministic, str backend) "
    "-> (Tensor out, Tensor maps, Tensor lse, Tensor row_max, Tensor row_argmax)",
)
torch.library.define(
    "cvg_kernels::attention_backward",
    f"(Tensor? grad_out, Tensor? grad_maps, Tensor? grad_lse, {_CALL}, Tensor out, Tensor lse, "
    "Tensor row_max, Tensor row_argmax, bool[] needed, bool deterministic, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_token_bias)",
)

_forward_op = torch.ops.cvg_kernels.attention.default
_backward_op = torch.ops.cvg_kernels.attention_backward.default


def attend(call: AttentionCall, deterministic: bool, backend: Backend) -> AttentionResult:
    """Runs the operation: out and maps are empty tensors, or `None`, where they are not computed."""
    if not torch.is_grad_enabled() and not somebody_looks(_tensors(call)):
        return _run(call, deterministic, backend.value)
    return AttentionResult(*_attend(*flat(call), deterministic, backend.value))


def operation_of(call: AttentionCall) -> str:
    """The public operation that a call belongs to: a key of the table of kernels."""
    return "attention" if call.band is None else "frame_band_attention"


def _tensors(call: AttentionCall) -> tuple:
    """By name: torch.compile of older releases cannot slice a named tuple."""
    return (call.query, call.key, call.value, call.token_ids, call.key_bias, call.token_bias)


def flat(call: AttentionCall) -> tuple:
    """The call as the operation takes it."""
    band = Band(None, None, 0.0, 0.0, False) if call.band is None else call.band
    return (*_tensors(call), *band, call.scale, call.head_mean)


def _call(flat: tuple) -> AttentionCall:
    band = None if flat[6] is None else Band(*flat[6:11])
    return AttentionCall(*flat[:6], band, *flat[11:])


_FLAT = 13  # how many arguments a call is


def _run(call: AttentionCall, deterministic: bool, backend: str) -> AttentionResult:
    facts = facts_of(call, deterministic)
    return run_kernel(operation_of(call), backend, facts, lambda kernel: kernel.forward(call))


def _forward(*given):
    call = _call(given[:_FLAT])
    result = _run(call, *given[_FLAT:])
    empty = call.query.new_empty
    return tuple(empty(0) if tensor is None else tensor for tensor in result)


@torch.library.register_fake("cvg_kernels::attention")
def _forward_fake(*given):
    call = _call(given[:_FLAT])
    query, new = call.query, call.query.new_empty
    batch, heads, queries, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    maps_shape = (0,)
    if call.token_ids is not None:
        tokens = call.token_ids.shape[1]
        maps_shape = (batch, *(() if call.head_mean else (heads,)), tokens, queries)
    rows = query.shape[:3]
    return (
        new(0) if call.value is None else dense_like(query, call.value.shape[3]),
        new(maps_shape, dtype=query.dtype if call.token_ids is None else wide),
        new(rows, dtype=wide),
        new(0) if call.band is None else new(rows, dtype=wide),
        new(0) if call.band is None else new(rows, dtype=torch.int32),
    )


def _backward(*given):
    grads, call = AttentionGrads(*given[:3]), _call(given[3 : 3 + _FLAT])
    out, *rows, needed, deterministic, backend = given[3 + _FLAT :]
    result, needed = AttentionResult(out, None, *rows), Needed(*needed)
    if grads.out is None and needed.value:
        raise ValueError("needed.value: the gradient of value flows through grad_out, which is None")
    arriving = (grad is not None for grad in grads)
    facts = facts_of(call, deterministic, *needed, *arriving)
    found = run_kernel(
        f"{operation_of(call)}_backward", backend, facts, lambda kernel: kernel.backward(call, result, grads, needed)
    )
    empty = call.query.new_empty
    return tuple(empty(0) if grad is None else grad for grad in found)


@torch.library.register_fake("cvg_kernels::attention_backward")
def _backward_fake(*given):
    call, needed = _call(given[3 : 3 + _FLAT]), Needed(*given[3 + _FLAT + 4])
    query = call.query
    wide = torch.promote_types(query.dtype, torch.float32)
    tensors = zip((call.query, call.key, call.value), needed[:3], strict=True)
    grads = [dense_like(tensor) if need else query.new_empty(0) for tensor, need in tensors]
    bias_shape = call.token_bias.shape if needed.token_bias else (0,)
    return (*grads, query.new_empty(bias_shape, dtype=wide if needed.token_bias else query.dtype))


def _remember(ctx, inputs, output) -> None:
    *flat, ctx.deterministic, ctx.backend = inputs
    tensors, ctx.options = flat[:8], flat[8:]
    out, _, *rows = output  # the maps are their user's to change
    ctx.save_for_backward(*tensors, out, *rows)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)  # an output without a gradient costs no work


def _differentiate(ctx, grad_out, grad_maps, grad_lse, grad_highest, grad_place):
    saved = ctx.saved_tensors  # asked for once: under checkpointing it is computed anew
    tensors, result = saved[:8], saved[8:]
    nothing = (None,) * (_FLAT + 2)
    value, token_ids = tensors[2], tensors[3]
    grads = (None if value is None else grad_out, None if token_ids is None else grad_maps, grad_lse)
    needs = ctx.needs_input_grad
    needed = Needed(needs[0], needs[1], needs[2] and grads[0] is not None, needs[5])
    if not any(needed) or all(grad is None for grad in grads):
        return nothing
    # Where a graph of the gradient is wanted, the registered operation says that there is none.
    run = _backward_op if torch.is_grad_enabled() else _run_backward
    found = run(*grads, *tensors, *ctx.options, *result, list(needed), ctx.deterministic, ctx.backend)
    query, key, value, bias = (grad if need else None for grad, need in zip(found, needed, strict=True))
    return (query, key, value, None, None, bias, *nothing[6:])


# `torch.library.impl` as a decorator would take the functions away.
torch.library.impl("cvg_kernels::attention", ("cpu", "cuda"), _forward)
torch.library.impl("cvg_kernels::attention_backward", ("cpu", "cuda"), _backward)
register_autograd("cvg_kernels::attention", _differentiate, setup_context=_remember)
forbid_double_backward("attention")
_run_backward = directly(_backward_op, _backward)
_attend = with_shortcut(_forward_op, _forward, _differentiate, setup_context=_remember)
