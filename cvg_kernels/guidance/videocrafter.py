"""VSTAR, and the temporal maps, in VideoCrafter's own code: on its UNet, whatever sampler calls it."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from cvg_kernels.capture.layers import Grid, unet_grid
from cvg_kernels.capture.videocrafter import (
    TemporalCrossAttention,
    standing_in,
    temporal_cross_attentions,
)
from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.vstar import VSTAR

_INPUT_LAYER = "init_attn"  # as in diffusers, the network's first temporal layer is left alone


@dataclass(frozen=True)
class TemporalRecord:
    """The maps of one temporal layer in one call of the UNet."""

    step: int  #: of the sampler, 0 first
    call: int  #: which call of this step, 0 first (VideoCrafter's sampler: conditional, unconditional)
    timestep: float
    layer: str  #: dotted path of the attention module
    grid: Grid  #: frames, rows, columns
    maps: torch.Tensor  #: `[B, h·w, F, F]`, row = attending frame, on the device


@dataclass(frozen=True)
class _Call:
    step: int
    number: int
    timestep: float
    latents: tuple[int, ...]  # [B, C, F, H, W]


class VideoCrafterTemporal:
    """VSTAR's band on the temporal attention of VideoCrafter's UNet, and its maps; a context manager.

        unet = model.model.diffusion_model
        with VideoCrafterTemporal(unet, cvg.VSTAR(sigma={64: 1.0, 32: 8.0}), steps=50, capture=True) as nursed:
            samples, _ = DDIMSampler(model).sample(S=50, …)
        nursed.records

    A call of the UNet with a lower timestep than the one before begins the next step, one with a higher a new run. Nothing
    of the network is patched: inside the block, `TemporalCrossAttention` modules with the same parameters stand in the
    places of the temporal attention modules.

    Args:
        unet: called as `unet(latents [B, C, F, H, W], timesteps, …)`, with `TemporalTransformer`s in it.
        vstar: sigma, strength, until and backend are used; synopsis prompts and `trained_frames` are not of this layer.
            `VSTAR(sigma=None)`, the default, regularises nothing.
        steps: how many the sampler makes, which `vstar.until` is a share of; not needed without a band.
        capture: whether to record the maps.

    Raises:
        ArgumentError: for a network without temporal attention, a band without `steps`, or prompts.
    """

    def __init__(
        self,
        unet: nn.Module,
        vstar: VSTAR | None = None,
        *,
        steps: int | None = None,
        capture: bool = False,
    ) -> None:
        vstar = VSTAR(sigma=None) if vstar is None else vstar
        if vstar.sigma is not None and (steps is None or steps < 1):
            raise ArgumentError(f"steps must say how many steps the sampler makes, got {steps!r}")
        if vstar.prompts is not None or vstar.trained_frames is not None:
            raise ArgumentError(
                "vstar must regularise only: prompts and trained_frames are for diffusers pipelines"
            )
        self.records: list[TemporalRecord] = []
        self._unet, self._vstar, self._capture = unet, vstar, capture
        self._regularised = 0 if steps is None else math.ceil(vstar.until * steps)
        self._attentions = temporal_cross_attentions(unet)
        self._last: _Call | None = None
        self._inside = False

    def __enter__(self) -> VideoCrafterTemporal:
        others = {}
        for name, attention in self._attentions.items():
            band = None if name.split(".")[0] == _INPUT_LAYER else self._band
            sink = partial(self._record, name) if self._capture else None
            others[name] = TemporalCrossAttention(attention, band, sink, self._vstar.backend)
        with ExitStack() as stack:
            stack.enter_context(standing_in(self._unet, others))
            begin = self._unet.register_forward_pre_hook(self._begin_call, with_kwargs=True)
            end = self._unet.register_forward_hook(self._end_call, always_call=True)
            stack.callback(begin.remove)
            stack.callback(end.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _begin_call(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs["x"]
        timesteps = args[1] if len(args) > 1 else kwargs["timesteps"]
        now, last = float(torch.as_tensor(timesteps).flatten()[0]), self._last
        if last is None or now > last.timestep:
            step, number = 0, 0
        elif now == last.timestep:
            step, number = last.step, last.number + 1
        else:
            step, number = last.step + 1, 0
        self._last, self._inside = _Call(step, number, now, tuple(latents.shape)), True

    def _end_call(self, *call: Any) -> None:
        """A layer that runs again in a backward pass has the band of its call, and is not recorded twice."""
        self._inside = False

    def _band(self, positions: int) -> dict[str, Any]:
        call = self._last
        if self._vstar.sigma is None or call.step >= self._regularised:
            return {}
        columns = self._grid(call, positions)[2]
        return self._vstar.band(columns, call.latents[-1])

    def _grid(self, call: _Call, positions: int) -> Grid:
        return unet_grid(call.latents, positions // call.latents[0], self._unet)

    def _record(self, layer: str, maps: torch.Tensor) -> None:
        if not self._inside:
            return
        call = self._last
        grid = self._grid(call, maps.shape[0])
        maps = maps.unflatten(0, (call.latents[0], -1))
        self.records.append(
            TemporalRecord(call.step, call.number, call.timestep, layer, grid, maps)
        )
