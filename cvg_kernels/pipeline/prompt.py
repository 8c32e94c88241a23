"""`RunPrompt`: the prompt of one call of a pipeline, and where its tokens stand in the text that the denoiser is
given.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError, GuidanceWarning
from cvg_kernels.pipeline.live_texts import LiveTexts, unknown_places
from cvg_kernels.pipeline.rehearsal import Reading, Rehearsal, tokenizer_of
from cvg_kernels.pipeline.signatures import naming_signature
from cvg_kernels.pipeline.text_rows import Rows, flat, followed
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.encoding import Template
from cvg_kernels.prompts.tokens import EncodedText


class RunPrompt:
    """What is known of the prompt of a run.

    Args:
        pipe: the pipeline.
        options: options of its call, by name; `None` for a loop of the user's own, which encodes its prompt itself.
        prompt: what the prompt is where the pipeline is given embeddings only.
    """

    def __init__(self, pipe: VideoPipeline, options: dict[str, Any] | None, prompt: str | list[str] | None) -> None:
        self.pipe = pipe
        self._own_loop, self._options = options is None, options or {}
        self._prompt = self._options.get("prompt")
        # Without a prompt, a text that the pipeline encodes is the negative one.
        self._encodes = self._own_loop or self._prompt is not None
        if self._prompt is None:
            self._prompt = prompt
        elif prompt is not None and prompt != self._prompt:
            warnings.warn(
                f"prompt={prompt!r} is for calls with prompt_embeds; the pipeline was given {self._prompt!r}, which "
                "counts",
                GuidanceWarning,
                stacklevel=2,
            )
        self.live = LiveTexts(pipe)  # what the text encoders were really given
        #: What `encode_prompt` made of the prompt; some pipelines do not call it if they are given embeddings.
        self.embeddings: torch.Tensor | None = _given_embeddings(self._options)
        self.negative: torch.Tensor | None = None
        self._encoding: dict[str, Any] | None = None  # the arguments of `encode_prompt`
        self._sure = False  # whether that call was the prompt's
        self._rehearsing = False
        self._text: torch.Tensor | None = None  # of the samples with the prompt, one entry a sample
        self._moved: list[Rows] | None = None  # by a connector: per sample of the text
        self._texts: list[EncodedText] | None = None

    @property
    def listens(self) -> bool:
        """Whether what a text encoder is given now belongs to the pipeline's own prompt."""
        return self._encodes and not self._rehearsing and self._text is None

    # -- what is noted while the pipeline runs

    def note_encoding(self, arguments: dict[str, Any], result: Any) -> None:
        """Notes a call of `encode_prompt`: of several, the prompt's is the first that is given the pipeline's prompt.

        Args:
            arguments: arguments of the call, by name.
            result: what it returned: embeddings, and perhaps those of the negative prompt.
        """
        if self._rehearsing:
            return
        texts = _listed(arguments.get("prompt"))
        sure = texts is not None and set(texts) == set(_listed(self._prompt) or ())
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        embeddings = outputs[0] if torch.is_tensor(outputs[0]) else None
        others = not self._encodes and texts is not None
        if others or (self._encoding is not None and (self._sure or not sure)):
            self.negative = embeddings if self.negative is None else self.negative
            return
        if self._encoding is not None:
            self.negative = self.embeddings  # what came first was the text of another prompt
        self._encoding, self._sure, self.embeddings = arguments, sure, embeddings
        if self._encodes and self._prompt is None:
            self._prompt, self._sure = arguments.get("prompt"), True
        alike = (one for one in outputs[1:] if _same_shape(one, embeddings))
        self.negative = next(alike, self.negative)

    def note_moved(self, rows: list[Rows]) -> None:
        """Notes how a module of the pipeline moved the tokens before they reach the denoiser.

        Args:
            rows: for each sample of the text, per token that comes out the one that goes in.
        """
        if self._text is None:
            self._moved = rows

    def note_text(self, text: torch.Tensor, start: int, batch: int) -> None:
        """Notes what the denoiser is given of the text, the first time that it is given the prompt.

        Args:
            text: `[batch · n, L, C]`.
            start: the first sample with the prompt.
            batch: samples of the call.
        """
        if self._text is not None or text.shape[0] % batch:
            return
        each = text.shape[0] // batch
        self._text = flat(text)[start * each : (start + self.samples) * each : each]
        if self._moved is not None:
            self._moved = self._moved[start : start + self.samples]
        self.live.settle(self._text)
        self._texts = None

    # -- what it means

    @property
    def windowed(self) -> bool:
        """Whether FreeNoise is on: one video, its prompt perhaps a dictionary of frames."""
        return bool(getattr(self.pipe, "free_noise_enabled", False))

    def given(self) -> list[str]:
        """The prompts as they were given, one a video asked for."""
        prompt = self._prompt
        if isinstance(prompt, dict):
            if len(set(prompt.values())) > 1:
                raise ArgumentError(
                    "prompt must be one text where words are looked for, got one for each of the frames "
                    f"{sorted(prompt)}: their words stand in different places"
                )
            prompt = next(iter(prompt.values()))
        if prompt is None or (isinstance(prompt, list) and not prompt):
            if self._own_loop:
                raise ArgumentError(
                    "prompt is not known: encode it within the block (pipe.encode_prompt), or pass prompt=… at "
                    "attaching"
                )
            if any(name.startswith("prompt_embeds") and value is not None for name, value in self._options.items()):
                raise ArgumentError(
                    "prompt is not known, since the pipeline was given prompt_embeds: pass prompt=… as well"
                )
            raise ArgumentError("prompt is not known, since the call has none: pass prompt=… as well")
        return [prompt] if isinstance(prompt, str) else list(prompt)

    @property
    def samples(self) -> int:
        """How many videos are made at once."""
        if self.windowed:
            return 1
        if self.embeddings is not None:
            return self.embeddings.shape[0]
        if tokenizer_of(self.pipe, "text_encoder") is None:  # an image in the place of a prompt
            image = self._options.get("image")
            asked = len(image) if isinstance(image, (list, tuple, torch.Tensor)) else 1
        else:
            asked = len(self.given())
        return asked * (self._options.get("num_videos_per_prompt") or 1)

    def texts(self) -> list[EncodedText]:
        """The prompt of each video as the text encoder read it, its tokens in their places among the denoiser's.

        Raises:
            ArgumentError: if the pipeline was given embeddings and nobody said what they mean, more prompts were named
                than there are videos, the pipeline has no tokenizer, or the tokens cannot be followed to the denoiser.
        """
        if self._texts is None:
            if tokenizer_of(self.pipe, "text_encoder") is None:
                raise unknown_places(self.pipe, "it has no tokenizer")
            prompts = self.given()
            if self.samples % len(prompts):
                raise ArgumentError(
                    f"prompt must name one text for each of the {self.samples} videos, got {len(prompts)}"
                )
            each = self.samples // len(prompts)
            self._texts = [
                text.placed(self._onward(number * each + video, text.length))
                for number, text in enumerate(self._read(prompts, each))
                for video in range(each)
            ]
        return self._texts

    def _read(self, prompts: list[str], each: int) -> list[EncodedText]:
        """The prompts with their tokens in their places in what `encode_prompt` returns."""
        if not hasattr(type(self.pipe), "encode_prompt"):
            return self.live.texts(prompts, each)
        options = {**self._options, **(self._encoding or {})}
        rehearsal = Rehearsal(self.pipe, options)
        encoded = _listed((self._encoding or {}).get("prompt")) or []
        # The pipeline may have rewritten the prompts; FreeNoise encodes one for every key frame.
        own = self._encodes and (self._sure or len(encoded) == len(prompts))
        asked = encoded if own else prompts
        with self._rehearsed():
            readings, reason = self._rehearse(rehearsal, asked)
        if reason:
            readings = self.live.readings(len(prompts), self._length)
            if readings is None:
                raise unknown_places(self.pipe, reason)
        return [
            EncodedText.of_ids(
                tokenizer_of(self.pipe, reading.encoder),
                reading.ids,
                prompt,
                lambda encoder=reading.encoder: self._template(rehearsal, encoder),
            ).placed(reading.rows)
            for reading, prompt in zip(readings, prompts, strict=False)
        ]

    def _rehearse(self, rehearsal: Rehearsal, prompts: Sequence[str]) -> tuple[list[Reading], str | None]:
        """What the text encoders read, or the reason for not knowing it."""
        try:
            readings = rehearsal.read(prompts, self._length)
        except Exception as error:  # of a pipeline's own code, which may ask a stand-in for anything
            return [], f"its encode_prompt cannot be followed: {type(error).__name__}: {error}"
        for reading in readings:
            if self._length not in (None, len(reading.rows)):
                return (
                    [],
                    f"its embeddings have {self._length} tokens, not {len(reading.rows)} as those of its prompt",
                )
            if not self.live.knows(reading.encoder, reading.ids):
                return [], "its text encoder was given other tokens than those of the prompt"
        return readings, None

    def _template(self, rehearsal: Rehearsal, encoder: str) -> Template:
        with self._rehearsed():
            return rehearsal.template(encoder)

    @property
    def _length(self) -> int | None:
        return None if self.embeddings is None else flat(self.embeddings).shape[1]

    def _onward(self, sample: int, length: int) -> Rows:
        """Rows of the denoiser's text of a sample in what `encode_prompt` returned."""
        same = tuple(range(length))
        if self._moved is not None:
            return self._moved[sample]
        if self._text is None or self.embeddings is None:
            return same
        text = self._text[sample]
        embedding = flat(self.embeddings)[sample if len(self.embeddings) > sample else 0].to(text.device)
        if text.shape == embedding.shape and torch.equal(text, embedding.to(text.dtype)):
            return same
        rows = followed(text, embedding)
        if rows is None:
            raise unknown_places(self.pipe, "it changes the text between encode_prompt and the denoiser")
        return rows

    def convert(self, word: str) -> str:
        """A word as the pipeline rewrites it: a textual inversion of several vectors has several tokens."""
        rewrite = getattr(self.pipe, "maybe_convert_prompt", None)
        return word if rewrite is None else rewrite(word, self.pipe.tokenizer)

    def encode(self, texts: list[str], device: torch.device) -> list[torch.Tensor]:
        """Embeddings `[tokens, C]` of other texts, each as the pipeline encodes it alone: some cut the padding off.

        Args:
            texts: to encode.
            device: device of the result.

        Raises:
            ArgumentError: for a pipeline without `encode_prompt`.
        """
        encode = getattr(type(self.pipe), "encode_prompt", None)
        if encode is None:
            raise ArgumentError(f"pipe must have encode_prompt to encode other texts, got {type(self.pipe).__name__}")
        changes = {
            "negative_prompt": None,
            "prompt_embeds": None,
            "negative_prompt_embeds": None,
            "num_images_per_prompt": 1,
            "num_videos_per_prompt": 1,
            "do_classifier_free_guidance": False,
            "device": device,
        }
        known = naming_signature(type(self.pipe), "encode_prompt", "prompt").parameters
        options = (self._encoding or {}) | {n: to for n, to in changes.items() if n in known}
        with self._rehearsed():
            return [encode(self.pipe, **{**options, "prompt": text})[0][0] for text in texts]

    @contextmanager
    def _rehearsed(self) -> Iterator[None]:
        """While it is open, what is encoded is not the pipeline's own."""
        before, self._rehearsing = self._rehearsing, True
        try:
            yield
        finally:
            self._rehearsing = before


def _listed(prompt: Any) -> list[str] | None:
    """Prompts as a list, those of FreeNoise's frames too."""
    if isinstance(prompt, dict):
        return list(prompt.values())
    return [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)


def _given_embeddings(options: dict[str, Any]) -> torch.Tensor | None:
    """The prompt's embeddings among the arguments of a pipeline."""
    named = (value for name, value in options.items() if name.startswith("prompt_embeds"))
    return next((one for one in named if torch.is_tensor(one) and one.ndim > 2), None)


def _same_shape(one: Any, other: torch.Tensor | None) -> bool:
    return torch.is_tensor(one) and other is not None and one.shape == other.shape
