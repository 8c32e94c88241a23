"""Perturbed attention guidance: its processors out of the way of methods, and gone when a run ends,
however it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cvg_kernels.pipeline.layers import attention_layers, give_processor
from cvg_kernels.pipeline.models import denoisers_of
from cvg_kernels.pipeline.taps import keep_taps
from cvg_kernels.pipeline.uninterrupted import each_of, uninterrupted
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


class Disturbance:
    """What PAG does with the processors of a pipeline in one run.

    While a pipeline with PAG runs, some layers have processors that take a batch of all branches apart. A run of it
    that fails leaves them.

    Args:
        pipe: the pipeline, before the run.
    """

    def __init__(self, pipe: VideoPipeline) -> None:
        disturbing = getattr(pipe, "_pag_attn_processors", None) or ()
        self._kinds = tuple({type(processor) for processor in disturbing})
        self._stock: dict[nn.Module, Any] = {}  # attention module → its processor before the run
        if self._kinds:
            self._note(pipe)

    def _note(self, pipe: VideoPipeline) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        for denoiser in denoisers_of(pipe):
            for layer in attention_layers(denoiser):
                processor = layer.module.processor
                left = isinstance(processor, self._kinds)  # by an earlier run that failed
                self._stock[layer.module] = AttnProcessor2_0() if left else processor

    @contextmanager
    def lifted(self, denoiser: nn.Module) -> Iterator[None]:
        """The processors of before the run, for calls that methods make.

        Args:
            denoiser: the network.
        """
        changed = []
        for layer in attention_layers(denoiser) if self._kinds else ():
            if isinstance(layer.module.processor, self._kinds):
                changed.append((layer.module, layer.module.processor))
                give_processor(layer.module, self._stock[layer.module])
                keep_taps(layer)
        try:
            yield
        finally:
            uninterrupted(each_of, give_processor, changed)

    def end(self) -> None:
        """Puts back what a run has left in the place of the processors of before."""
        for module, processor in self._stock.items():
            if isinstance(module.processor, self._kinds):
                give_processor(module, processor)
