"""What a capture puts on a layer: it asks for the layer's maps and hands them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from cvg_kernels.pipeline.attention import MapRequest, Place
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.geometry import Geometry
from cvg_kernels.pipeline.layers import Layer
from cvg_kernels.pipeline.models import Grid
from cvg_kernels.pipeline.taps import Tap
from cvg_kernels.prompts.token_table import TokenTable

Kind = Literal["cross", "temporal"]


@dataclass(frozen=True)
class RecordedCall:
    """A denoiser call that is recorded."""

    call: Call
    geometry: Geometry
    table: TokenTable | None  # of every sample; `None` without words


class Records(Protocol):
    """What keeps the maps."""

    def recorded(self) -> RecordedCall | None:
        """The call that is under way and recorded."""
        ...

    def record(self, layer: Layer, kind: Kind, recorded: RecordedCall, maps: torch.Tensor, grid: Grid) -> None:
        """Keeps the maps of a layer."""
        ...


class Recorder(Tap):
    """Asks one layer for its maps and hands them to what keeps them."""

    foreseen = True

    def __init__(
        self, records: Records, layer: Layer, kind: Kind, gradients: bool, head_reduction: Any, backend: Any
    ) -> None:
        self.records = records
        self.layer = layer
        self.kind: Kind = kind
        self.gradients = gradients
        self.head_reduction = head_reduction
        self.backend = backend
        self.last: RecordedCall | None = None  # a replayed layer computes as it did in its call

    def _wanted(self) -> RecordedCall | None:
        return self.records.recorded() or (self.last if self.gradients else None)

    def active(self) -> bool:
        """Whether the call that is under way is recorded."""
        return self._wanted() is not None

    def maps(self, place: Place) -> MapRequest | None:
        """Asks for the maps of the words, or of the frames."""
        recorded = self._wanted()
        if recorded is None or not place.of_text:
            return None
        self.last = recorded

        def receive(maps: torch.Tensor, grid: Grid) -> None:
            # by words in a replay too: it must save what the call saved
            if self.kind == "cross" and recorded.table is not None:
                maps = recorded.table.by_word(maps)
            if self.records.recorded() is not None:
                self.records.record(self.layer, self.kind, recorded, maps, grid)

        ids = None if recorded.table is None else recorded.table.ids
        spans = self.kind == "temporal" and self.layer.kind != "temporal"
        return MapRequest(
            recorded.geometry, receive, "whole" if spans else None, ids, self.head_reduction, self.backend
        )
