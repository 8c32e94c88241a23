"""Hooks on the modules of a pipeline that a prompt passes before it reaches the denoiser."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cvg_kernels.pipeline.exchange import Listener
from cvg_kernels.pipeline.prompt import RunPrompt
from cvg_kernels.pipeline.rehearsal import text_encoders
from cvg_kernels.pipeline.signatures import named_arguments
from cvg_kernels.pipeline.text_rows import Rows
from cvg_kernels.pipeline.video_pipeline import VideoPipeline


def listening(pipe: VideoPipeline, prompt: RunPrompt) -> Iterator[Callable[[], None]]:
    """Lets a run's prompt hear what its text encoders are given, and where other modules move its tokens.

    Args:
        pipe: the pipeline.
        prompt: prompt of the run.

    Returns:
        What takes the hooks away again.
    """
    thread = threading.get_ident()  # another one may use the text encoder for a pipeline of its own

    def heard(note: Callable[..., None]) -> Listener:
        return Listener(lambda *args: note(*args) if threading.get_ident() == thread else None)

    for name in text_encoders(pipe):
        encoder = getattr(pipe, name)
        if isinstance(encoder, nn.Module):
            before, after = _reader(name, prompt)
            yield encoder.register_forward_pre_hook(heard(before), with_kwargs=True).remove
            if prompt.live.keeps:
                yield encoder.register_forward_hook(heard(after)).remove
    connectors = getattr(pipe, "connectors", None)
    if isinstance(connectors, nn.Module):
        moves = _mover(type(connectors), prompt)
        yield connectors.register_forward_pre_hook(heard(moves), with_kwargs=True).remove


def _reader(name: str, prompt: RunPrompt) -> tuple[Callable[..., None], Callable[..., None]]:
    """Notes what a text encoder is given, and what it returns."""

    def before(encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if prompt.listens:
            prompt.live.note(name, kwargs.get("input_ids", args[0] if args else None))

    def after(encoder: nn.Module, args: tuple, output: Any) -> None:
        if prompt.listens:
            prompt.live.keep(output)

    return before, after


def _mover(kind: type, prompt: RunPrompt) -> Callable[..., None]:
    """Notes how LTX 2's connectors move the tokens."""

    def before(connectors: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = named_arguments(kind, "forward", "attention_mask", args, kwargs)
        prompt.note_moved(connected_rows(connectors, given["attention_mask"]))

    return before


def connected_rows(connectors: nn.Module, mask: torch.Tensor) -> list[Rows]:
    """Where LTX 2's connectors put each token, for each sample.

    They are a transformer on the text, so that every token that comes out has seen the others, but each continues one
    that goes in. With learned registers, the tokens that are no padding come first, in their order, and registers fill
    the rest; without, all stay where they are.

    Args:
        connectors: `LTX2TextConnectors`.
        mask: which tokens are no padding, `[B, L]`.
    """
    stays = connectors.video_connector.learnable_registers is None
    moved: list[Rows] = []
    for row in (mask > 0).tolist():
        kept = range(len(row)) if stays else [row_index for row_index, real in enumerate(row) if real]
        moved.append((*kept, *[None] * (len(row) - len(kept))))
    return moved
