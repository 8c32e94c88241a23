"""`Sampling`: one call of a pipeline, from its beginning to its end: what was asked for, and where it stands."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError, GuidanceWarning
from cvg_kernels.pipeline.geometry import Branch
from cvg_kernels.pipeline.models import Model
from cvg_kernels.pipeline.signatures import naming_signature
from cvg_kernels.prompts.tokens import EncodedText


class Sampling:
    """What is known of one call of a pipeline; nothing of it outlives the call.

    Args:
        pipe: the pipeline.
        number: of the call, 0 first.
        options: its arguments by name; `None` for a loop of the user's own, which encodes its prompt itself.
        prompt: what the prompt is where the pipeline is given embeddings only.
    """

    def __init__(
        self, pipe: Any, number: int, options: dict[str, Any] | None, prompt: str | list[str] | None
    ) -> None:
        self.pipe = pipe
        self.number = number
        own_loop, options = options is None, options or {}
        self._prompt = options.get("prompt")
        # Without a prompt, a text that the pipeline encodes is the negative one.
        self._encodes = own_loop or self._prompt is not None
        if self._prompt is None:
            self._prompt = prompt
        elif prompt is not None and prompt != self._prompt:
            warnings.warn(
                f"prompt={prompt!r} is for calls with prompt_embeds; the pipeline was given {self._prompt!r}, which counts",
                GuidanceWarning,
                stacklevel=2,
            )
        self._own_loop = own_loop
        self._repeats = options.get("num_videos_per_prompt") or 1
        self._encoding: dict[str, Any] | None = None  # the arguments of `encode_prompt`
        self._embeddings: torch.Tensor | None = None
        self._negative: torch.Tensor | None = None
        self._ids: list[list[int]] | None = None  # of the text encoder, one row a prompt
        self._texts: list[EncodedText] | None = None
        self.steps = 0  # begun; FreeInit makes several rounds of them in one run
        self.memory: dict[Any, Any] = {}  # what methods keep for the length of the run
        self.end_step()

    def end_step(self) -> None:
        """Forgets what belongs to one denoising step."""
        self._seen: set[Branch] = set()

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """Makes something once for the run and returns it ever after.

        Args:
            key: names it.
            make: makes it.
        """
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    # -- what the prompt is

    def note_encoding(self, arguments: dict[str, Any], result: Any) -> None:
        """Notes a call of `encode_prompt`: the first is that of the prompt, whatever the pipeline encodes later.

        Args:
            arguments: of the call, by name.
            result: what it returned: embeddings, and perhaps those of the negative prompt.
        """
        if self._encoding is not None:
            return
        self._encoding = arguments
        if self._encodes and self._prompt is None:
            self._prompt = arguments.get("prompt")
        if isinstance(result, (tuple, list)):
            self._embeddings = result[0]
            self._negative = result[1] if len(result) > 1 and torch.is_tensor(result[1]) else None
        else:
            self._embeddings = result

    def note_ids(self, ids: Any) -> None:
        """Notes what the text encoder was given; its first call of a run is that of the prompt.

        Args:
            ids: `input_ids`, one row a prompt.
        """
        if self._encodes and self._ids is None and torch.is_tensor(ids) and ids.ndim == 2:
            self._ids = ids.tolist()

    @property
    def windowed(self) -> bool:
        """Whether FreeNoise is on: one video, its prompt perhaps a dictionary of frames."""
        return bool(getattr(self.pipe, "free_noise_enabled", False))

    def _given(self) -> list[str]:
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
                    "prompt is not known: encode it within the block (pipe.encode_prompt), or pass prompt=… at attaching"
                )
            raise ArgumentError(
                "prompt is not known, since the pipeline was given prompt_embeds: pass prompt=… as well"
            )
        return [prompt] if isinstance(prompt, str) else list(prompt)

    @property
    def samples(self) -> int:
        """How many videos are made at once."""
        if self.windowed:
            return 1
        if self._embeddings is not None:
            return self._embeddings.shape[0]
        return len(self._given()) * self._repeats

    def texts(self) -> list[EncodedText]:
        """The prompt of each video as the text encoder read it.

        Raises:
            ArgumentError: if the pipeline was given embeddings and nobody said what they mean, or more prompts were named
                than there are videos.
        """
        if self._texts is None:
            prompts = self._given()
            if self.samples % len(prompts):
                raise ArgumentError(
                    f"prompt must name one text for each of the {self.samples} videos, got {len(prompts)}"
                )
            tokenizer = getattr(self.pipe, "tokenizer", None)
            if tokenizer is None:
                raise ArgumentError(
                    f"pipe must have a tokenizer, got {type(self.pipe).__name__} without"
                )
            ids = self._ids if self._ids is not None and len(self._ids) >= len(prompts) else None
            read = [
                EncodedText.of_prompt(tokenizer, prompt)
                if ids is None
                else EncodedText.of_ids(tokenizer, ids[number], prompt)
                for number, prompt in enumerate(prompts)
            ]
            each = self.samples // len(prompts)
            self._texts = [text for text in read for _ in range(each)]
        return self._texts

    def convert(self, word: str) -> str:
        """A word as the pipeline rewrites it: a textual inversion of several vectors has several tokens."""
        rewrite = getattr(self.pipe, "maybe_convert_prompt", None)
        return word if rewrite is None else rewrite(word, self.pipe.tokenizer)

    def encode(self, texts: list[str], device: torch.device) -> list[torch.Tensor]:
        """Embeddings `[tokens, C]` of other texts, each as the pipeline encodes it alone: some cut the padding off.

        Args:
            texts: to encode.
            device: of the result.

        Raises:
            ArgumentError: for a pipeline without `encode_prompt`.
        """
        encode = getattr(type(self.pipe), "encode_prompt", None)
        if encode is None:
            raise ArgumentError(
                f"pipe must have encode_prompt to encode other texts, got {type(self.pipe).__name__}"
            )
        changes = {
            "negative_prompt": None, "prompt_embeds": None, "negative_prompt_embeds": None,
            "num_images_per_prompt": 1, "num_videos_per_prompt": 1,
            "do_classifier_free_guidance": False, "device": device,
        }  # fmt: skip
        known = naming_signature(type(self.pipe), "encode_prompt", "prompt").parameters
        options = (self._encoding or {}) | {n: to for n, to in changes.items() if n in known}
        return [encode(self.pipe, **{**options, "prompt": text})[0][0] for text in texts]

    # -- which sample is what

    def branches(self, model: Model, batch: int, text: torch.Tensor) -> tuple[Branch, ...]:
        """Which branch each sample of a denoiser call belongs to.

        Args:
            model: table entry of the denoiser.
            batch: samples of the call.
            text: what the denoiser is given of the text.

        Raises:
            ArgumentError: for a batch that is no known multiple of the number of videos.
        """
        samples = self.samples
        disturbed = bool(getattr(self.pipe, "do_perturbed_attention_guidance", False))
        guided = bool(getattr(self.pipe, "do_classifier_free_guidance", True))
        if batch == samples and not model.batched_branches:
            kinds: tuple[Branch, ...] = (self._branch_by_text(text),)
        elif batch == samples:
            kinds = ("cond",)
        elif batch == 2 * samples:
            kinds = ("cond", "perturbed") if disturbed and not guided else ("uncond", "cond")
        elif batch == 3 * samples and disturbed:
            kinds = ("uncond", "cond", "perturbed")
        else:
            raise ArgumentError(
                f"the denoiser was called with a batch of {batch} for {samples} video(s): which samples see the prompt is "
                f"not known of {type(self.pipe).__name__}"
            )
        self._seen |= set(kinds)
        return tuple(kind for kind in kinds for _ in range(samples))

    def _branch_by_text(self, text: torch.Tensor) -> Branch:
        """The branch of a call that holds one of them only."""
        guider = getattr(self.pipe, "guider", None)
        if hasattr(guider, "is_conditional"):
            if not guider.is_conditional:
                return "uncond"
            return (
                "perturbed" if "cond" in self._seen else "cond"
            )  # a second time with layers left out
        prompted = self._same(text, self._embeddings)
        if self._same(
            text, self._negative
        ):  # if the prompts are equal, the prompt's call is the first
            return "uncond" if not prompted or "cond" in self._seen else "cond"
        return "cond" if prompted or "cond" not in self._seen else "uncond"

    @staticmethod
    def _same(text: torch.Tensor, embeddings: torch.Tensor | None) -> bool:
        if embeddings is None or text.shape != embeddings.shape:
            return False
        return torch.equal(text, embeddings.to(text.device, text.dtype))
