"""Maps of chosen layers from one denoiser call, attached to the graph: what guidance differentiates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.attention import MapRequest, Place
from cvg_kernels.pipeline.compiled import hearing, taking_part
from cvg_kernels.pipeline.geometry import Geometry
from cvg_kernels.pipeline.guards import check_extra_forwards
from cvg_kernels.pipeline.layers import Layer, attention_layers, frame_maps
from cvg_kernels.pipeline.models import Grid, arguments_of, model_of, unwrap
from cvg_kernels.pipeline.parallel import adding_up_gradients
from cvg_kernels.pipeline.taps import Tap, tapped
from cvg_kernels.pipeline.uninterrupted import uninterrupted
from cvg_kernels.prompts.tokens import check_reach


class _Finished(Exception):
    """Ends a forward pass after its last captured layer; never leaves `LayerCapture.run`."""


class LayerCapture:
    """Runs a denoiser and returns the maps of chosen layers, ending the forward after the last of them.

    Use as a context manager that also spans the backward pass: with gradient checkpointing the layers run again there,
    and must run the same way.

    Args:
        denoiser: a denoiser of a class in `models.MODELS`.
        token_ids: int64 `[B, K]`, on the host.
        layers: names of text cross-attention layers.
        temporal_layers: names of temporal maps, as `layers.frame_maps` has them. Those of attention that spans the
            video are of the frames alone, so that their rows sum to 1 as those of temporal attention do.
        spatial_layers: names of self-attention layers within a frame.
        head_reduction: reduction over the heads of the cross maps: `"mean"`, or `"none"` to keep the heads,
            `[B, heads, K, F, h, w]`.
        stop_after_last: end the forward once every chosen layer has run.
        backend: which implementation of the operations to use.

    Raises:
        ArgumentError: for a layer that is not there, or a denoiser with a cache (its state would be poisoned by the
            extra forward passes) or with its sequence spread over several processes.
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
        check_extra_forwards(denoiser)
        self.denoiser = denoiser
        self.token_ids = token_ids
        self.head_reduction = head_reduction
        self.stop_after_last = stop_after_last
        self.backend = backend
        kinds = {"cross": layers, "temporal": temporal_layers, "self": spatial_layers}
        if spatial_layers and not model_of(denoiser).frames_in_batch:
            raise ArgumentError(
                f"spatial_layers need attention within each frame, which {type(unwrap(denoiser)).__name__} has not"
            )
        known = {"temporal": frame_maps(denoiser) if temporal_layers else {}}
        for kind in ("cross", "self"):
            known[kind] = {layer.name: layer for layer in attention_layers(denoiser) if layer.kind == kind}
        self._chosen: list[tuple[Layer, _MapTap]] = []
        for kind, names in kinds.items():
            for name in names:
                if name not in known[kind]:
                    raise ArgumentError(f"{name!r} is no {kind} layer; these are: {', '.join(known[kind])}")
                layer = known[kind][name]
                spans = kind == "temporal" and layer.kind != "temporal"
                self._chosen.append((layer, _MapTap(self, name, "alone" if spans else None)))
        self._maps: dict[str, torch.Tensor] | None = None  # None: not recording
        self._geometry: Geometry | None = None
        self._ids_there = token_ids  # on the device of the latents

    def __enter__(self) -> LayerCapture:
        with ExitStack() as stack:
            stack.enter_context(tapped(self._chosen))
            layers = [layer for layer, _ in self._chosen]
            stack.enter_context(taking_part(self.denoiser, layers))
            stack.enter_context(hearing(self.denoiser, self._begin_call))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        uninterrupted(self._stack.close)

    def _begin_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        arguments = arguments_of(module, args, kwargs)
        self._geometry = Geometry.of(module, arguments)
        check_reach(self.token_ids, self._geometry.text_length)
        self._ids_there = self.token_ids.to(arguments[self._geometry.model.latents].device)
        return adding_up_gradients(module, args, kwargs)

    def request(self, name: str, over_frames: Literal["alone"] | None) -> MapRequest:
        """The maps of a name; in the replay of a checkpointed layer too, which must save what its call saved."""

        def receive(maps: torch.Tensor, grid: Grid) -> None:
            if self._maps is not None:
                self._maps[name] = maps
                if self.stop_after_last and len(self._maps) == len(self._chosen):
                    raise _Finished

        return MapRequest(self._geometry, receive, over_frames, self._ids_there, self.head_reduction, self.backend)

    def run(self, call: Callable[[], Any]) -> dict[str, torch.Tensor]:
        """Makes one denoiser call and returns name → maps.

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


class _MapTap(Tap):
    """Asks one layer for its maps."""

    foreseen = True

    def __init__(self, capture: LayerCapture, name: str, over_frames: Literal["alone"] | None) -> None:
        self.capture = capture
        self.name = name
        self.over_frames = over_frames

    def maps(self, place: Place) -> MapRequest | None:
        return self.capture.request(self.name, self.over_frames) if place.of_text else None
