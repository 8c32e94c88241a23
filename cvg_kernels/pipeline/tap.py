"""`Tap`: what takes part in an attention layer; `Plan`: what taps want of a layer that is part of a compiled graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cvg_kernels.pipeline.attention import Attention, MapRequest, Place, hand_over
from cvg_kernels.pipeline.models import Grid

SLOT = "_cvg_taps"  #: attribute of an attention module that has some


class Tap:
    """Takes part in a layer's attention; subclasses say in what.

    Attributes:
        backend: which implementation of the operations to use.
        computes: whether the attention is computed by our kernels even if nothing is wanted of it: the drop-in swap.
        foreseen: whether `maps` needs to know no more than the place, and there is no band: then the tap is asked
            before the call, and takes part in compiled graphs.
        constant: whether its answers are the same at every call, so that it is asked once.
    """

    backend: str = "auto"
    computes: bool = False
    foreseen: bool = False
    constant: bool = False

    def active(self) -> bool:
        """Whether the tap may want something of the layer now; if none does, the layer runs as ever."""
        return True

    def band(self, attention: Attention) -> dict[str, Any]:
        """The options of `temporal_attention` or `frame_band_attention` that regularise the layer; empty: none."""
        return {}

    def maps(self, place: Place) -> MapRequest | None:
        """The maps that are wanted of the layer, or `None`."""
        return None


@dataclass
class Turns:
    """Counts the layers that have left maps in one call of a graph."""

    taken: int = 0


@dataclass
class Plan:
    """What is wanted of a compiled layer's next call, and what its graph leaves.

    A graph is compiled anew when Python objects that it looks at have changed, as those of taps do from step to step.
    It looks at this instead, of which nothing changes but tensors, and nothing says which layer it is: the blocks of a
    network share their graph.

    Attributes:
        requests: requests of maps, of those calls of attention that have the text among the keys.
        computes: whether our kernels compute the layer even if nothing is wanted of it.
        backend: which implementation to use.
        disturbs: as in `Place`.
        turns: turns of the call, shared by its layers.
        turn: which of them this layer was.
        found: (number of the call of attention, maps for each request).
    """

    requests: tuple[MapRequest, ...]
    computes: bool
    backend: str
    disturbs: bool
    turns: Turns
    turn: int = 0
    found: tuple[tuple[int, list[torch.Tensor]], ...] = ()


class Samples:
    """Gives on the maps of one forward of a layer, which may attend to each sample in a call of its own."""

    def __init__(self) -> None:
        self._parts: dict[int, list[torch.Tensor]] = {}  # of each request

    def hand_over(self, place: Place, requests: Sequence[MapRequest], found: Sequence[torch.Tensor]) -> None:
        """Gives on the maps of a call of attention, or keeps them until there are those of all samples.

        Args:
            place: place of the call.
            requests: requests of the maps, the same at every call.
            found: maps for each, as `attend` returned them.
        """
        for sample, (request, maps) in enumerate(zip(requests, found, strict=True)):
            whole = request if place.sample is None else self._of_all(sample, request)
            hand_over(place, whole, maps)

    def _of_all(self, sample: int, request: MapRequest) -> MapRequest:
        """A request for one sample as part of that for all."""
        parts = self._parts.setdefault(sample, [])

        def receive(maps: torch.Tensor, grid: Grid) -> None:
            parts.append(maps)
            if len(parts) == request.geometry.latents[0]:
                request.receive(torch.cat(parts), grid)

        return replace(request, receive=receive)


def disturbs_samples(kind: type) -> bool:
    """Whether a processor is one of PAG's."""
    return kind.__name__.startswith("PAG")


def requests_of(taps: Sequence[Tap], place: Place) -> tuple[MapRequest, ...]:
    """Asks taps for the maps that they want of a place."""
    return tuple(request for tap in taps if (request := tap.maps(place)))


def backend_of(taps: Sequence[Tap], requests: Sequence[MapRequest]) -> str:
    """The backend that somebody names."""
    chosen = (part.backend for part in (*taps, *requests))
    return next((backend for backend in chosen if backend != "auto"), "auto")
