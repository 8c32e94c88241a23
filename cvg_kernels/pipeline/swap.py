"""The drop-in swap: a pipeline's own processors, their attention computed by our kernels."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from cvg_kernels.backends import parse_backend
from cvg_kernels.errors import ArgumentError, GuidanceWarning
from cvg_kernels.pipeline.layers import Layer, attention_layers
from cvg_kernels.pipeline.models import denoisers_of
from cvg_kernels.pipeline.taps import Tap, add_tap, is_tapped, remove_tap
from cvg_kernels.pipeline.uninterrupted import each_of, uninterrupted
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


class _Swap(Tap):
    """Attention by our kernels with nothing kept."""

    computes = True
    foreseen = True
    constant = True

    def __init__(self, backend: str) -> None:
        self.backend = backend


class ProcessorSwap:
    """Handle of `use_processors`; as a context manager it restores at the end of the block.

    Attributes:
        layers: names of the layers that compute with our kernels, for as long as they do.
    """

    def __init__(self, swapped: list[tuple[Layer, Tap]]) -> None:
        self._swapped = swapped

    @property
    def layers(self) -> list[str]:
        """Names of the layers that compute with our kernels."""
        return [layer.name for layer, _ in self._swapped]

    def restore(self) -> None:
        """Puts the stock processors back; more than once does no harm, in whatever order swaps are restored.

        Layers that were given other processors meanwhile, as some pipelines do in every call, keep these, with a
        warning: they have not computed with our kernels since.
        """
        others = [layer.name for layer, _ in self._swapped if not is_tapped(layer)]
        uninterrupted(each_of, remove_tap, self._swapped)
        count, self._swapped = len(self._swapped), []
        if others:
            warnings.warn(
                f"{len(others)} of {count} swapped layers were given other processors meanwhile and then computed "
                f"without our kernels: {', '.join(others[:3])}{' …' if len(others) > 3 else ''}",
                GuidanceWarning,
                stacklevel=2,
            )

    def __enter__(self) -> ProcessorSwap:
        if not self._swapped:
            raise ArgumentError("this swap has been restored already: call use_processors(pipe) again")
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"ProcessorSwap({len(self._swapped)} layers)"


def use_processors(pipe: VideoPipeline | nn.Module, *, backend: str = "auto") -> ProcessorSwap:
    """Lets every text and temporal attention layer of a pipeline compute with our kernels: the drop-in swap.

    The video is that of the stock pipeline to floating-point tolerance. Joint attention is text attention too. Under
    `auto` text attention is torch's own as long as nobody wants its maps: nothing is faster there, and a backend asked
    for by name computes it all.
    Self-attention keeps the stock kernel: it has no tokens to capture, and the fused kernels of torch serve it well.

    Args:
        pipe: a diffusers pipeline or a denoiser.
        backend: which implementation of the operations to use.

    Returns:
        A handle with `layers` and `restore()`.

    Raises:
        ArgumentError: if no layer could be swapped, or for a backend that is none.
    """
    parse_backend(backend)
    chosen = [layer for denoiser in denoisers_of(pipe) for layer in attention_layers(denoiser) if layer.kind != "self"]
    if not chosen:
        kinds = ", ".join(type(denoiser).__name__ for denoiser in denoisers_of(pipe))
        raise ArgumentError(f"pipe must have text or temporal attention layers that are known; none is in {kinds}")
    swapped: list[tuple[Layer, Tap]] = [(layer, _Swap(backend)) for layer in chosen]
    try:
        for layer, tap in swapped:
            add_tap(layer, tap)
    except BaseException:
        uninterrupted(each_of, remove_tap, swapped)
        raise
    return ProcessorSwap(swapped)


class _SwappedBlock(AbstractContextManager[ProcessorSwap]):
    """Swaps when a `with` block begins, and back when it ends; one block after the other."""

    def __init__(self, **asked: Any) -> None:
        self._asked = asked
        self._swap: ProcessorSwap | None = None

    def __enter__(self) -> ProcessorSwap:
        if self._swap is not None:
            raise ArgumentError("this block of processors(…) is open already: leave it first")
        self._swap = use_processors(**self._asked)
        return self._swap

    def __exit__(self, *error: object) -> None:
        swap, self._swap = self._swap, None
        if swap is not None:
            swap.restore()


def processors(pipe: VideoPipeline | nn.Module, *, backend: str = "auto") -> AbstractContextManager[ProcessorSwap]:
    """`use_processors` for the length of a `with` block.

    Args:
        pipe: as for `use_processors`.
        backend: likewise.

    Raises:
        ArgumentError: as `use_processors`, when the block begins.
    """
    return _SwappedBlock(pipe=pipe, backend=backend)
