"""Several guidance methods at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.attach import Attachment, Run, Step


@dataclass(frozen=True)
class Together:
    """Methods on one pipeline: those that change the network (VSTAR, Gen-1), and within them those that move the latents.

    The latents of a step are moved by one method after the other.

    Attributes:
        methods: in the order in which they move.
    """

    methods: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.methods:
            raise ArgumentError("methods must hold at least one method, got none")

    def attach(self, pipe: Any, prompt: str | list[str] | None = None):
        """Connects to a pipeline; a context manager whose `Run` holds the history of all methods that move.

        Args:
            pipe: a diffusers pipeline.
            prompt: says what the prompt is if the pipeline is called with `prompt_embeds`.

        Raises:
            ArgumentError: for a pipeline that one of the methods cannot guide.
        """
        each = [(method, method.attach(pipe, prompt)) for method in self.methods]
        around = [attachment for method, attachment in each if not hasattr(method, "move")]
        movers = tuple(method for method, _ in each if hasattr(method, "move"))
        if movers:
            around.append(Attachment(_InTurn(movers), pipe, prompt))
        return _entered(around)


@contextmanager
def _entered(attachments: list[Any]) -> Iterator[Run]:
    """All attachments at once; the run is that of the last."""
    with ExitStack() as stack:
        runs = [stack.enter_context(attachment) for attachment in attachments]
        yield runs[-1]


@dataclass(frozen=True)
class _InTurn:
    """A method that is several, each moving the latents that the one before has left."""

    methods: tuple[Any, ...]

    def move(self, step: Step, run: Run) -> torch.Tensor | None:
        """Moves the latents of one denoising step; see `attach.Method`."""
        moved = None
        for method in self.methods:
            after = method.move(step, run)
            if after is not None:
                moved = after.detach()
                step = replace(step, latents=moved)
        return moved
