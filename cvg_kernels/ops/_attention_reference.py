"""The reference as a backend: the closed-form gradient stands in where autograd is below the operation."""

from __future__ import annotations

import torch

from cvg_kernels._layout import copied_like, dense_like, lies_like, with_layout_of
from cvg_kernels.ops._attention_call import AttentionCall, AttentionGrads, AttentionResult, Needed
from cvg_kernels.ops._autocast import autocast_off
from cvg_kernels.reference import attention as reference
from cvg_kernels.reference.frame_band_attention import frame_band


def attend(call: AttentionCall, mask: torch.Tensor | None = None) -> AttentionResult:
    """Attention in plain operations of torch, for autograd to differentiate; see `cvg_kernels.reference.attention`.

    Args:
        call: the arguments.
        mask: additive and broadcastable to `[B, H, N, M]`, in place of the call's key bias.
    """
    with autocast_off(call.query.device):
        found = reference.attention_with_capture(
            call.query, call.key, call.value, call.token_ids, head_mean=call.head_mean, **_options(call, mask)
        )
    row_argmax = None if call.band is None else found.row_argmax.to(torch.int32)
    row_max = None if call.band is None else found.row_max
    out = found.out
    if out is not None and not torch.compiler.is_compiling():  # which lays out what it computes itself
        out = copied_like(out, call.query)
    return AttentionResult(out, found.maps, found.lse, row_max, row_argmax)


def forward(call: AttentionCall) -> AttentionResult:
    """As `attend`, its results laid out as the contract of backends says."""
    found = attend(call)
    out = None
    if found.out is not None and not lies_like(found.out, call.query):  # a size of 1 has any stride
        out = dense_like(call.query, call.value.shape[-1]).copy_(found.out)
    maps = None if found.maps is None else found.maps.contiguous()
    return found._replace(out=found.out if out is None else out, maps=maps)


def backward(
    call: AttentionCall, result: AttentionResult, grads: AttentionGrads, needed: Needed
) -> tuple[torch.Tensor | None, ...]:
    """The gradients asked for; the result is computed anew."""
    with autocast_off(call.query.device):
        *found, grad_bias = reference.attention_with_capture_backward(
            *grads, call.query, call.key, call.value, call.token_ids, head_mean=call.head_mean, **_options(call)
        )
    tensors = (call.query, call.key, call.value)
    laid = with_layout_of(found, tensors, needed[:3])
    if not needed.token_bias:
        return (*laid, None)
    return (*laid, _shared_out(grad_bias.contiguous(), call.token_ids))


def capture(call: AttentionCall, lse: torch.Tensor) -> torch.Tensor:
    """The maps of the call, whose log-sum-exp is known."""
    del lse
    return forward(call._replace(value=None)).maps


def _options(call: AttentionCall, mask: torch.Tensor | None = None) -> dict:
    """The keyword arguments that both passes of the reference share."""
    options = {"scale": call.scale, "mask": mask, "token_bias": None, "band": None}
    if mask is None and call.key_bias is not None:
        options["mask"] = call.key_bias[:, None, None]
    if call.token_bias is not None:  # of a repeated key it is there twice, and belongs to the logits once
        options["token_bias"] = _shared_out(call.token_bias, call.token_ids)
    if call.band is not None:
        band = call.band
        wide = torch.promote_types(call.query.dtype, torch.float32)
        matrix = frame_band(band.query_frames, band.key_frames, band.sigma, wide)
        options["band"], options["row_max_grad"] = band.strength * matrix, band.row_max_grad
    return options


def _shared_out(numbers: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Numbers `[B, K, N]` divided by how often the key of each occurs among the ids."""
    times = (token_ids[:, :, None] == token_ids[:, None, :]).sum(-1)
    return numbers / times[..., None]
