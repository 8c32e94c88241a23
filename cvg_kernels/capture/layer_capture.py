"""Maps of chosen layers from one denoiser call, attached to the graph: what guidance differentiates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn

from cvg_kernels.capture.layers import Grid, Layer, Model, attention_layers, model_of, unwrap
from cvg_kernels.capture.processors import (
    InterceptingProcessor,
    band_of,
    installed,
    per_key_mask,
    refuse_compiled,
)
from cvg_kernels.capture.temporal import temporal_layer, text_maps, video_layer
from cvg_kernels.capture.tokens import check_reach
from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import attention_with_capture


class _Finished(Exception):
    """Ends a forward pass after its last captured layer; never leaves `LayerCapture.run`."""


def layer_maps(
    layer: Layer, model: Model, denoiser: nn.Module, latents: tuple[int, ...],
    token_ids: torch.Tensor, head_reduction: str, backend: str,
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, Grid]:  # fmt: skip
    """Attention of one layer with its maps, arranged over the video.

    Args:
        layer: cross (joint attention too: the maps are those of the video's queries), temporal, or self (of a model whose
            self-attention stays within a frame).
        model: table entry of the denoiser.
        denoiser: the network.
        latents: shape of the latents of this call, `[B, C, F, H, W]`.
        token_ids: `[B, K]`, tokens to capture in cross-attention.
        head_reduction: `"mean"` or `"none"` (cross only).
        backend: of the operation.
        query: `[B', heads, N, D]`, as the layer made it; key, value, mask and scale likewise.
        key: see `query`.
        value: see `query`.
        mask: see `query`.
        scale: see `query`.

    Returns:
        The layer's output; its maps, cross `[B, K, F, h, w]` (or `[B, heads, K, F, h, w]`), temporal `[B, h·w, F, F]`
        and self `[B, F, h·w, h·w]` with the attending frame or position first; and the grid (F, h, w).
    """
    batch, frames = latents[0], latents[2]
    options = {"scale": scale, "key_mask": per_key_mask(mask), "backend": backend}
    if layer.kind == "temporal":
        band = band_of(layer.module, query)
        out, maps = temporal_layer(query, key, value, mask, scale, band, backend, capture=True)
        maps = maps.unflatten(0, (batch, -1))  # [B, h·w, F, F]
        return out, maps, model.grid(latents, maps.shape[1], unwrap(denoiser))
    if layer.kind == "self":  # every key is captured
        captured = attention_with_capture(
            query, key, value, torch.arange(key.shape[2], device=query.device), **options
        )
        maps = captured.maps.mT.unflatten(0, (batch, -1))  # [B, F, h·w, h·w]
        return captured.out, maps, model.grid(latents, maps.shape[2], unwrap(denoiser))

    if model.frames_in_batch:
        token_ids = token_ids.repeat_interleave(frames, dim=0)
    band = band_of(layer.module, query)
    if band:  # joint attention, regularised
        out, lse = video_layer(query, key, value, mask, scale, backend, **band)
        maps = text_maps(query, key, lse, token_ids, scale)
        maps = maps.mean(1) if head_reduction == "mean" else maps
    else:
        out, maps, _ = attention_with_capture(
            query, key, value, token_ids, head_reduction=head_reduction, **options
        )
    grid = model.grid(latents, maps.shape[-1], unwrap(denoiser))
    if model.frames_in_batch:
        maps = maps.unflatten(0, (batch, frames)).movedim(1, -2)  # [B, (heads,) K, F, h·w]
    else:
        maps = maps[..., -math.prod(grid) :]  # without the queries of a text
        maps = maps.unflatten(-1, (grid[0], -1))
    return out, maps.unflatten(-1, grid[1:]), grid


class LayerCapture:
    """Runs a denoiser and returns the maps of chosen layers, ending the forward after the last of them.

    Use as a context manager that also spans the backward pass: with gradient checkpointing the layers run again there,
    and must run the same way.

    Args:
        denoiser: of a class in `layers.MODELS`, not compiled.
        token_ids: int64 `[B, K]`, on the host.
        layers: names of text cross-attention layers.
        temporal_layers: names of temporal attention layers.
        spatial_layers: names of self-attention layers within a frame.
        head_reduction: of the cross maps: `"mean"`, or `"none"` to keep the heads, `[B, heads, K, F, h, w]`.
        stop_after_last: end the forward once every chosen layer has run.
        backend: of `attention_with_capture`.

    Raises:
        ArgumentError: for a layer that is not there, a compiled denoiser, or one with a cache (its state would be
            poisoned by the extra forward passes).
    """

    def __init__(
        self,
        denoiser: nn.Module,
        token_ids: torch.Tensor,
        layers: Sequence[str],
        temporal_layers: Sequence[str] = (),
        spatial_layers: Sequence[str] = (),
        *,
        head_reduction: Literal["mean", "none"] = "mean",
        stop_after_last: bool = True,
        backend: str = "auto",
    ) -> None:
        refuse_compiled(denoiser)
        if getattr(denoiser, "is_cache_enabled", False):
            raise ArgumentError(
                "the denoiser has a cache enabled, which the extra forward passes of guidance would poison: call "
                "disable_cache() first"
            )
        self.denoiser = denoiser
        self.model = model_of(denoiser)
        self.token_ids = token_ids
        self.head_reduction = head_reduction
        self.stop_after_last = stop_after_last
        self.backend = backend
        kinds = {"cross": layers, "temporal": temporal_layers, "self": spatial_layers}
        if spatial_layers and not self.model.frames_in_batch:
            raise ArgumentError(
                f"spatial_layers need attention within each frame, which {type(unwrap(denoiser)).__name__} has not"
            )
        there = {layer.name: layer for layer in attention_layers(denoiser)}
        self._chosen: list[Layer] = []
        for kind, names in kinds.items():
            for name in names:
                if name not in there or there[name].kind != kind:
                    known = [layer.name for layer in there.values() if layer.kind == kind]
                    raise ArgumentError(
                        f"{name!r} is no {kind} layer; these are: {', '.join(known)}"
                    )
                self._chosen.append(there[name])
        self._maps: dict[str, torch.Tensor] | None = None  # None: not recording
        self._latents: tuple[int, ...] = ()
        self._ids_there = token_ids  # on the device of the latents

    def __enter__(self) -> LayerCapture:
        self._stack = ExitStack()
        self._stack.enter_context(
            installed(
                {
                    layer.module: InterceptingProcessor.wrap(
                        layer.module.processor, layer.name, self._handler(layer)
                    )
                    for layer in self._chosen
                }
            )
        )
        hook = self.denoiser.register_forward_pre_hook(self._begin_call, with_kwargs=True)
        self._stack.callback(hook.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _begin_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        check_reach(self.token_ids, kwargs["encoder_hidden_states"].shape[1])
        latents = self.model.latents_of(args, kwargs)
        self._latents = tuple(latents.shape)
        self._ids_there = self.token_ids.to(latents.device)

    def _handler(self, layer: Layer) -> Callable[..., torch.Tensor]:
        def attend(query, key, value, mask, scale):
            out, maps, _ = layer_maps(
                layer, self.model, self.denoiser, self._latents, self._ids_there, self.head_reduction,
                self.backend, query, key, value, mask, scale,
            )  # fmt: skip
            if self._maps is not None:
                self._maps[layer.name] = maps
                if self.stop_after_last and len(self._maps) == len(self._chosen):
                    raise _Finished
            return out

        return attend

    def run(self, call: Callable[[], Any]) -> dict[str, torch.Tensor]:
        """Makes one denoiser call and returns layer name → maps.

        Args:
            call: calls the denoiser; what it returns is dropped.
        """
        self._maps = maps = {}
        try:
            call()
        except _Finished:
            pass
        finally:
            self._maps = None  # a replay during the backward pass is not recorded
        return maps
