"""The features of CVG: cross-attention maps of each entity's words, per layer and head, on a common grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.layer_capture import LayerCapture
from cvg_kernels.pipeline.layers import attention_layers
from cvg_kernels.pipeline.models import Grid
from cvg_kernels.prompts.token_table import TokenTable


@dataclass(frozen=True)
class Selection:
    """Which maps are features; the same in training and in guidance.

    Attributes:
        layers: names of text cross-attention layers.
        heads: number of heads of each layer. Every head is a map of its own.
        grid: frames, rows and columns that every map is resized to.
    """

    layers: tuple[str, ...]
    heads: tuple[int, ...]
    grid: Grid

    @classmethod
    def of(cls, denoiser: nn.Module, grid: Grid, layers: Callable[[str], bool] = lambda name: True) -> Selection:
        """The text layers of a denoiser.

        Args:
            denoiser: the network.
            grid: see `grid`.
            layers: which of them, by name.

        Raises:
            ArgumentError: if no layer is left.
        """
        chosen = [layer for layer in attention_layers(denoiser) if layer.kind == "cross" and layers(layer.name)]
        if not chosen:
            raise ArgumentError("layers selects no text cross-attention layer of the denoiser")
        names = tuple(layer.name for layer in chosen)
        frames, rows, columns = grid
        return cls(names, tuple(layer.heads for layer in chosen), (frames, rows, columns))

    @property
    def maps(self) -> int:
        """M, how many maps an entity has at a step."""
        return sum(self.heads)

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Number of the layer and of the head of each map, int64 `[M]` both."""
        layer = [number for number, heads in enumerate(self.heads) for _ in range(heads)]
        head = [head for heads in self.heads for head in range(heads)]
        return torch.tensor(layer), torch.tensor(head)


class FeatureReader:
    """Reads the features of denoiser calls, attached to the graph; a context manager that spans the backward pass too.

    Args:
        denoiser: the network.
        selection: which maps.
        table: which tokens are whose, with an entity for a word.
        backend: which implementation of `attention_with_capture` to use.

    Raises:
        ArgumentError: for a layer that is not there.
    """

    def __init__(self, denoiser: nn.Module, selection: Selection, table: TokenTable, backend: str = "auto") -> None:
        self.selection = selection
        self.table = table
        self._capture = LayerCapture(denoiser, table.ids, selection.layers, head_reduction="none", backend=backend)

    def __enter__(self) -> FeatureReader:
        self._capture.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._capture.__exit__(*error)

    def read(self, call: Callable[[], Any]) -> torch.Tensor:
        """Makes one denoiser call and returns the maps of each entity, float32 `[B, E, M, F, h, w]`.

        An entity's map is the sum over its tokens: the share of attention that goes to it.

        Args:
            call: calls the denoiser; it ends after the last chosen layer.
        """
        captured = self._capture.run(call)
        maps = []
        for name in self.selection.layers:
            entity = self.table.by_word(captured[name]).transpose(1, 2)  # [B, E, heads, F, h, w]
            flat = interpolate(entity.flatten(0, 1), self.selection.grid, mode="trilinear", align_corners=False)
            maps.append(flat.unflatten(0, entity.shape[:2]))
        return torch.cat(maps, dim=2)


def with_context(maps: torch.Tensor) -> torch.Tensor:
    """What the classifier is given for each entity: its own maps, and the sum of the others' as context.

    Args:
        maps: `[B, E, M, F, h, w]`, zeros where a prompt has fewer entities.

    Returns:
        `[B, E, 2, M, F, h, w]`.

    Examples:
        >>> from cvg_kernels.composition import with_context
        >>> with_context(torch.rand(1, 3, 5, 4, 8, 8)).shape
        torch.Size([1, 3, 2, 5, 4, 8, 8])
    """
    return torch.stack([maps, maps.sum(1, keepdim=True) - maps], dim=2)
