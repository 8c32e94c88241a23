"""`LiveTexts`: what the text encoders of a pipeline were really given in a run, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.rehearsal import Reading, tokenizer_of
from cvg_kernels.pipeline.text_rows import followed
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.tokens import EncodedText


@dataclass
class _Given:
    """One text that a text encoder was given."""

    encoder: str
    ids: tuple[int, ...]
    layers: tuple[torch.Tensor, ...] = ()  # `[T, C]` each


class LiveTexts:
    """The texts of a run.

    Pipelines without `encode_prompt` (modular ones) are followed by what their text encoders return; that is kept
    until the denoiser is called.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: VideoPipeline) -> None:
        self.pipe = pipe
        self.keeps = not hasattr(type(pipe), "encode_prompt")
        self._given: list[_Given] = []
        self._last: list[_Given] = []  # of the call under way
        self._settled: list[Reading | None] | None = None  # of each sample
        self._length: int | None = None  # of the denoiser's text

    def note(self, encoder: str, ids: Any) -> None:
        """Notes what a text encoder is given.

        Args:
            encoder: name of the component.
            ids: `input_ids`, one row a text.
        """
        readable = torch.is_tensor(ids) and ids.ndim == 2
        self._last = [_Given(encoder, tuple(row)) for row in ids.tolist()] if readable else []
        self._given += self._last

    def keep(self, output: Any) -> None:
        """Keeps what a text encoder returns for what was noted last.

        Args:
            output: as the text encoder returns it.
        """
        for layer in _tensors(output):
            if layer.shape[:2] == (len(self._last), len(self._last[0].ids) if self._last else 0):
                for one, rows in zip(self._last, layer, strict=True):
                    one.layers += (rows,)

    def knows(self, encoder: str, ids: tuple[int, ...]) -> bool:
        """Whether a text encoder was given these ids, as far as it was called.

        Args:
            encoder: name of the component.
            ids: ids of one text.
        """
        given = [one.ids for one in self._given if one.encoder == encoder]
        return not given or ids in given

    def settle(self, text: torch.Tensor) -> None:
        """Finds where the text that the denoiser is given comes from, and lets go of what was kept for that.

        Args:
            text: `[samples, L, C]`.
        """
        self._length = text.shape[1]
        if self.keeps and self._given:
            self._settled = [self._source(sample) for sample in text]
        for one in self._given:
            one.layers = ()

    def _source(self, text: torch.Tensor) -> Reading | None:
        found: list[tuple[int, Reading]] = []
        for one in self._given:
            for layer in one.layers:
                rows = followed(text, layer.to(text.device))
                if rows is not None:
                    count = sum(row is not None for row in rows)
                    found.append((count, Reading(one.encoder, one.ids, rows)))
        return max(found, key=lambda each: each[0])[1] if found else None

    def readings(self, count: int, length: int | None) -> list[Reading] | None:
        """The first texts of the run, if they are as long as the embeddings, which are then taken for theirs in order.

        Args:
            count: number of prompts.
            length: tokens of the embeddings.
        """
        first = self._given[:count]
        if len(first) < count or any(len(one.ids) != length for one in first):
            return None
        return [Reading(one.encoder, one.ids, tuple(range(length))) for one in first]

    def texts(self, prompts: list[str], each: int) -> list[EncodedText]:
        """The prompts of a pipeline without `encode_prompt`, as the denoiser is given them.

        Args:
            prompts: prompts of the run.
            each: videos of a prompt.

        Raises:
            ArgumentError: if the tokens cannot be followed to the denoiser.
        """
        if not self._given:  # the pipeline was given embeddings
            tokenizer = tokenizer_of(self.pipe, "text_encoder")
            return [EncodedText.of_prompt(tokenizer, prompt) for prompt in prompts]
        readings: list[Reading | None] | None = self._settled and self._settled[::each]
        if not readings or None in readings:
            readings = self.readings(len(prompts), self._length)
        if readings is None:
            raise unknown_places(self.pipe, "the denoiser's text is nothing its text encoder returned")
        return [
            EncodedText.of_ids(tokenizer_of(self.pipe, reading.encoder), reading.ids, prompt).placed(reading.rows)
            for reading, prompt in zip(readings, prompts, strict=True)
        ]


def unknown_places(pipe: VideoPipeline, reason: str) -> ArgumentError:
    """The error for words whose tokens cannot be followed to the denoiser, with the remedy.

    Args:
        pipe: the pipeline.
        reason: why not.
    """
    return ArgumentError(
        f"words: where their tokens stand in the text that the denoiser is given is not known of "
        f"{type(pipe).__name__}: {reason}. Name the places in place of the words, as in words=[TokenSpan('cat', 0, "
        "(12, 13))]"
    )


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors `[B, T, C]` of a text encoder's output."""
    items = output.values() if isinstance(output, dict) else output
    found: list[torch.Tensor] = []
    for item in [items] if torch.is_tensor(items) else items:
        if torch.is_tensor(item):
            found += [item] if item.ndim == 3 else []
        elif isinstance(item, (tuple, list)):
            found += _tensors(item)
    return found
