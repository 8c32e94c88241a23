"""What a pipeline is asked to show, and which half of a denoiser call is conditional."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal

import torch

from cvg_kernels.errors import ArgumentError

Branch = Literal["cond", "uncond"]


class PromptWatch:
    """Listens to `pipe.encode_prompt` while active and remembers the last prompts and their embeddings.

    Args:
        pipe: a diffusers pipeline.
        prompt: says what the prompt is where the pipeline is given embeddings only.
    """

    def __init__(self, pipe: Any, prompt: str | list[str] | None = None) -> None:
        self._pipe = pipe
        self._given = prompt
        self._prompts: list[str] = []
        self._options: dict[str, Any] = {}  # of the last call of encode_prompt
        self.embeddings: torch.Tensor | None = None
        self.runs = 0  #: how often the pipeline has been called

    def __enter__(self) -> PromptWatch:
        encode = self._pipe.encode_prompt
        self._previous = vars(self._pipe).get("encode_prompt")

        @functools.wraps(encode)
        def encode_prompt(*args: Any, **kwargs: Any):
            encoded = encode(*args, **kwargs)
            self._options = inspect.signature(encode).bind(*args, **kwargs).arguments
            self._note(self._options.get("prompt"), encoded[0])
            return encoded

        self._pipe.encode_prompt = encode_prompt
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is None:
            del self._pipe.encode_prompt
        else:
            self._pipe.encode_prompt = self._previous

    def _note(self, prompt: str | list[str] | None, embeddings: torch.Tensor) -> None:
        if prompt is None:
            prompt = self._given
        self.runs += 1
        self.embeddings = embeddings
        self._prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if hasattr(self._pipe, "_text_preprocessing"):  # Latte's text encoder reads small letters
            clean = self._options.get("clean_caption", False)
            self._prompts = self._pipe._text_preprocessing(self._prompts, clean_caption=clean)

    def encode(self, texts: list[str], device: torch.device) -> list[torch.Tensor]:
        """Embeddings `[tokens, C]` of other texts, each as the pipeline encodes it alone: some cut the padding off.

        Args:
            texts: to encode.
            device: of the result.
        """
        # By the class: a watch on the instance would take the texts for prompts of videos.
        encode = type(self._pipe).encode_prompt
        changes = {
            "negative_prompt": None, "prompt_embeds": None, "negative_prompt_embeds": None,
            "num_images_per_prompt": 1, "num_videos_per_prompt": 1,
            "do_classifier_free_guidance": False, "device": device,
        }  # fmt: skip
        known = inspect.signature(encode).parameters
        options = self._options | {name: to for name, to in changes.items() if name in known}
        return [encode(self._pipe, **{**options, "prompt": text})[0][0] for text in texts]

    @property
    def samples(self) -> int:
        """How many videos are made at once."""
        return 0 if self.embeddings is None else self.embeddings.shape[0]

    def prompts(self) -> list[str]:
        """The prompt of each video, repeated as the pipeline repeats it.

        Raises:
            ArgumentError: if the pipeline was given embeddings and nobody said what they mean.
        """
        if not self._prompts:
            raise ArgumentError(
                "prompt is not known, since the pipeline was given prompt_embeds: pass prompt=… as well"
            )
        each = self.samples // len(self._prompts)
        return [prompt for prompt in self._prompts for _ in range(each)]

    def branches(self, batch: int, text: torch.Tensor, batched: bool) -> list[Branch]:
        """Which branch each sample of a denoiser call belongs to.

        Args:
            batch: samples of the call.
            text: its `encoder_hidden_states`.
            batched: whether the pipeline stacks both branches into one call, unconditional first.
        """
        if batched and batch == 2 * self.samples:
            return ["uncond"] * self.samples + ["cond"] * self.samples
        if batched or self.embeddings is None:
            return ["cond"] * batch
        same = text.shape == self.embeddings.shape and torch.equal(
            text, self.embeddings.to(text.device, text.dtype)
        )
        return (["cond"] if same else ["uncond"]) * batch
