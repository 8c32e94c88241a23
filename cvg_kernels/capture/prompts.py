"""What a pipeline is asked to show, and which half of a denoiser call is conditional."""

from __future__ import annotations

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
        self.embeddings: torch.Tensor | None = None
        self.runs = 0  #: how often the pipeline has been called

    def __enter__(self) -> PromptWatch:
        encode = self._pipe.encode_prompt
        self._previous = vars(self._pipe).get("encode_prompt")

        def encode_prompt(*args: Any, **kwargs: Any):
            encoded = encode(*args, **kwargs)
            self._note(args[0] if args else kwargs.get("prompt"), encoded[0])
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
