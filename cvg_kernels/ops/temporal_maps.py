"""Maps between the frames of a video, out of attention over all of it: the public function and its registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from cvg_kernels._layout import dense_like
from cvg_kernels.backends import Backend
from cvg_kernels.errors import ArgumentError, is_whole
from cvg_kernels.kernels import Facts
from cvg_kernels.ops import _temporal_maps_reference as reference
from cvg_kernels.ops._autocast import cast_inputs
from cvg_kernels.ops._choice import run_kernel
from cvg_kernels.ops._registration import backend_on, forbid_double_backward
from cvg_kernels.ops._shortcut import directly, with_shortcut
from cvg_kernels.ops._temporal_maps_call import Targets, Video
from cvg_kernels.ops._trace import note_backend, register_autograd
from cvg_kernels.ops._transforms import backend_under_transforms
from cvg_kernels.ops._validate import Mask, check_tensors, normalize_mask, normalize_scale
from cvg_kernels.reference import temporal_maps as definition


def temporal_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor | None,
    grid: Sequence[int],
    *,
    query_start: int = 0,
    key_start: int = 0,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    head_reduction: Literal["mean", "none"] = "mean",
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """How the frames of a video attend to each other at every place, in attention that spans the whole video.

        S_ij = scale · q[i·hw + p] · k[j·hw + p] + mask
        maps[p, i, j] = exp(S_ij − lse[i·hw + p])               lse given: probabilities of the full attention
        maps[p, i, j] = exp(S_ij) / Σ_l exp(S_il)               lse is None: of the frames alone

    Only pairs of tokens at the same place are computed, F² · h · w of the (F · h · w)² there are: F² · h · w · H · D
    multiply-adds, 2 · F · h · w · H · D numbers read and F² · h · w written; the backward pass takes three times as
    many multiply-adds, and reads and writes what it must once each. With `lse` a row sums to the probability with
    which a place attends to itself in any frame; the rest of its attention goes elsewhere. What takes the rows of
    temporal attention as a whole, the flow of Vico or a band, wants them to sum to 1: `lse=None`, whose gradient needs
    no pass over the main attention.

    Differentiable in query, key and lse. The kernels give first derivatives; `backend="reference"` is differentiable
    twice. Under autocast query and key are cast as those of torch's own attention are.

    Args:
        query: `[B, H, N, D]`, float32, bfloat16, float16 or float64 (float64: CPU kernels and reference only), with
            any strides; `[B, N, H, D].transpose(1, 2)` costs no copy.
        key: `[B, H, M, D]`.
        lse: `[B, H, N]`, the log-sum-exp of the main attention's logits, as `attention_with_capture` returns it under
            the same scale and mask; −∞ in rows that see no key, whose maps are 0. `None`: maps whose rows sum to 1.
        grid: (F, h, w): frames, rows and columns of the video's tokens, which lie frame by frame.
        query_start: where the video begins among the queries: behind the text, or at 0 before it.
        key_start: where it begins among the keys.
        scale: factor of the logits; `None` is `D ** -0.5`.
        key_mask: as for `attention_with_capture`, over all M keys: bool `[B, M]` or additive `[B, 1, 1, M]`; a denser
            one is served by the reference only.
        head_reduction: `"mean"` averages the maps over the heads, `"none"` keeps them.
        backend: `"auto"`, or the name of one, which then never falls back: `"reference"`, `"native"` (C++, CPU
            tensors) or `"triton"` (GPU tensors; up to 128 frames, 32 in float32, and head_dim up to 128). On a GPU
            `auto` is the reference for what is larger.

    Returns:
        `[B, h·w, F, F]`, or `[B, H, h·w, F, F]` with heads; float32 (float64 for float64); row = attending frame.

    Raises:
        ArgumentError: if an argument does not fit; names it, what was given and what is accepted.
        BackendUnavailableError: if the named backend cannot run here; names the reason and the way to get it.

    The F × F maps in which Vico's flow and VSTAR's analysis are defined, for models without temporal layers.

    Examples:
        >>> query, key = torch.randn(2, 1, 8, 4 * 2 * 3, 32)
        >>> cvg.temporal_maps(query, key, None, grid=(4, 2, 3)).shape
        torch.Size([1, 6, 4, 4])
    """
    query, key, _ = cast_inputs(query, key, key)
    check_tensors(query, key, None, values=False)
    video = _video(grid, query_start, key_start, query, key)
    if head_reduction not in ("mean", "none"):
        raise ArgumentError(f"head_reduction must be 'mean' or 'none', got {head_reduction!r}")
    scale = normalize_scale(scale, query)
    mask = normalize_mask(key_mask, query, key)
    lse = _checked_lse(lse, mask, query)
    backend = backend_under_transforms("temporal_maps", backend, (query, key, lse, key_mask))
    if key_mask is not None and mask is not None and mask.dense and backend not in (Backend.AUTO, Backend.REFERENCE):
        raise ArgumentError(
            f"key_mask of shape {tuple(key_mask.shape)} depends on the query or the head; backend {backend.value!r} "
            "takes bool [B, M] or additive [B, 1, 1, M] only (the reference takes any)"
        )
    backend = backend_on("temporal_maps", backend, query.device)
    head_mean = head_reduction == "mean"
    if backend is Backend.REFERENCE or (mask is not None and mask.dense):
        note_backend("temporal_maps", "reference")
        call = video.call(query, key, lse, None, scale, head_mean)
        return reference.maps_of(call, None if mask is None else _pairs(mask.values, video))
    key_bias = None
    if mask is not None:
        if mask.values.requires_grad:
            raise ArgumentError("key_mask must not require a gradient, except with backend='reference'")
        key_bias = mask.values[:, 0, 0].contiguous()
    return _maps(query, key, lse, key_bias, *video, scale, head_mean, backend.value)


def _video(grid, query_start, key_start, query, key) -> Video:
    """Where the video lies, checked."""
    sizes = tuple(grid) if isinstance(grid, (tuple, list, torch.Size)) else ()
    if len(sizes) != 3 or not all(is_whole(n, 1) for n in sizes):
        raise ArgumentError(f"grid must be (F, h, w), numbers above 0, got {grid!r}")
    frames, places = sizes[0], sizes[1] * sizes[2]
    for name, start, whose, length in (
        ("query_start", query_start, "queries", query.shape[2]),
        ("key_start", key_start, "keys", key.shape[2]),
    ):
        if not is_whole(start, 0):
            raise ArgumentError(f"{name} must be a number of tokens, 0 or more, got {start!r}")
        if start + frames * places > length:
            raise ArgumentError(
                f"grid {sizes} behind {name} {start} must fit the {length} {whose}, and takes "
                f"{start + frames * places}"
            )
    return Video(frames, places, query_start, key_start)


def _checked_lse(lse, mask: Mask | None, query: torch.Tensor) -> torch.Tensor | None:
    """The log-sum-exp in the wide type, of logits whose mask is shifted."""
    if lse is None:
        return None
    if not isinstance(lse, torch.Tensor) or not lse.is_floating_point():
        given = getattr(lse, "dtype", type(lse).__name__)
        raise ArgumentError(f"lse must be a floating point tensor [B, H, N] or None, got {given}")
    if lse.ndim != 3 or any(a != b for a, b in zip(lse.shape, query.shape[:3], strict=True)):
        raise ArgumentError(f"lse must have shape [B, H, N] = {tuple(query.shape[:3])}, got {tuple(lse.shape)}")
    if lse.device != query.device:
        raise ArgumentError(f"lse must be on {query.device}, got {lse.device}")
    lse = lse.to(torch.promote_types(query.dtype, torch.float32))
    return lse if mask is None or mask.shift is None else lse - mask.shift


def _pairs(mask: torch.Tensor, video: Video) -> torch.Tensor:
    """What a mask that broadcasts to `[B, H, N, M]` adds to pairs of frames, `[B, P, H, F, F]` or what broadcasts to
    it.
    """
    frames, places = video.frames, video.places
    if mask.shape[3] == 1:  # the same for all keys
        mask = mask.expand(-1, -1, -1, video.key_start + frames * places)
    if mask.shape[2] == 1:
        return definition.by_place(mask[:, :, 0], frames, places, video.key_start)[:, :, :, None]
    mask = definition.by_place(mask, frames, places, video.query_start)  # [B, P, H, F, M]
    keys = mask.narrow(-1, video.key_start, frames * places).unflatten(-1, (frames, places))
    return keys.diagonal(dim1=1, dim2=5).movedim(-1, 1)


# --- registration ----------------------------------------------------------------------------------------------------
# What is not computed is an empty tensor: `None` cannot be returned by an operation.

_CALL = (
    "Tensor query, Tensor key, Tensor? lse, Tensor? key_bias, SymInt frames, SymInt places, SymInt query_start, "
    "SymInt key_start, float scale, bool head_mean"
)
torch.library.define("cvg_kernels::temporal_maps", f"({_CALL}, str backend) -> Tensor")
torch.library.define(
    "cvg_kernels::temporal_maps_backward",
    f"(Tensor grad_maps, {_CALL}, bool[] needed, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_lse)",
)

_forward_op = torch.ops.cvg_kernels.temporal_maps.default
_backward_op = torch.ops.cvg_kernels.temporal_maps_backward.default


def _call(query, key, lse, key_bias, frames, places, query_start, key_start, scale, head_mean):
    video = Video(frames, places, query_start, key_start)
    return video.call(query, key, lse, key_bias, scale, head_mean)


def _facts(query: torch.Tensor, frames: int) -> Facts:
    return Facts(query.device, query.dtype, frames=frames, head_dim=query.shape[3])


def _forward(*given):
    *call, backend = given
    return run_kernel("temporal_maps", backend, _facts(call[0], call[4]), lambda module: module.forward(_call(*call)))


@torch.library.register_fake("cvg_kernels::temporal_maps")
def _forward_fake(*given):
    query = given[0]
    return query.new_empty(_call(*given[:-1]).maps_shape, dtype=_wide(query))


def _backward(*given):
    grad_maps, *call, needed, backend = given
    query, key, lse, _, frames, places, query_start, key_start, *_ = call
    video = Video(frames, places, query_start, key_start)
    found = [_gradient(tensor, need) for tensor, need in zip((query, key, lse), needed, strict=True)]
    starts = (query_start, key_start, query_start)
    views = []
    for grad, start in zip(found, starts, strict=True):
        if grad is not None:
            # What is no token of the video has no gradient.
            grad[:, :, :start] = 0
            grad[:, :, start + frames * places :] = 0
        views.append(None if grad is None else definition.by_place(grad, frames, places, start))
    run_kernel(
        "temporal_maps_backward",
        backend,
        _facts(query, frames),
        lambda module: module.backward(video.call(*call[:4], *call[8:]), grad_maps, Targets(*views)),
    )
    return tuple(query.new_empty(0) if grad is None else grad for grad in found)


def _gradient(tensor: torch.Tensor, needed: bool) -> torch.Tensor | None:
    return dense_like(tensor) if needed else None


@torch.library.register_fake("cvg_kernels::temporal_maps_backward")
def _backward_fake(*given):
    (query, key, lse), needed = given[1:4], given[-2]
    found = (_gradient(tensor, need) for tensor, need in zip((query, key, lse), needed, strict=True))
    return tuple(query.new_empty(0) if grad is None else grad for grad in found)


def _wide(query: torch.Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _remember(ctx, inputs, output) -> None:
    *call, ctx.backend = inputs
    ctx.save_for_backward(*call[:4])
    ctx.options = call[4:]


def _differentiate(ctx, grad_maps):
    tensors = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    # Where a graph of the gradient is wanted, the registered operation says that there is none.
    run = _backward_op if torch.is_grad_enabled() else _run_backward
    found = run(grad_maps, *tensors, *ctx.options, needed, ctx.backend)
    grads = [grad if need else None for grad, need in zip(found, needed, strict=True)]
    return (*grads, *(None,) * 8)


# `torch.library.impl` as a decorator would take the functions away.
torch.library.impl("cvg_kernels::temporal_maps", ("cpu", "cuda"), _forward)
torch.library.impl("cvg_kernels::temporal_maps_backward", ("cpu", "cuda"), _backward)
register_autograd("cvg_kernels::temporal_maps", _differentiate, setup_context=_remember)
forbid_double_backward("temporal_maps")
_run_backward = directly(_backward_op, _backward)
_maps = with_shortcut(_forward_op, _forward, _differentiate, setup_context=_remember)
