"""Several guidance methods at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.attach import Attachment, Method, Run, Step


@dataclass(frozen=True)
class Together:
    """Methods that move the latents of a step one after the other.

    Attributes:
        methods: in the order in which they move.
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        if not self.methods:
            raise ArgumentError("methods must hold at least one method, got none")

    def attach(self, pipe: Any, prompt: str | list[str] | None = None) -> Attachment:
        """Connects to a pipeline; the `Run` holds the history of all methods, in their order.

        Args:
            pipe: a diffusers pipeline.
            prompt: says what the prompt is if the pipeline is called with `prompt_embeds`.

        Raises:
            ArgumentError: for a pipeline that one of the methods cannot guide.
        """
        for method in self.methods:
            method.attach(pipe, prompt)
        return Attachment(self, pipe, prompt)

    def move(self, step: Step, run: Run) -> torch.Tensor | None:
        """Moves the latents of one denoising step; see `attach.Method`."""
        moved = None
        for method in self.methods:
            after = method.move(step, run)
            if after is not None:
                moved = after.detach()
                step = replace(step, latents=moved)
        return moved
