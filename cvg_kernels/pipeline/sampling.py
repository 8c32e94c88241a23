"""`Sampling`: one call of a pipeline, from its beginning to its end: what was asked for, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.geometry import Branch
from cvg_kernels.pipeline.models import Model
from cvg_kernels.pipeline.prompt import RunPrompt
from cvg_kernels.pipeline.text_rows import flat
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.tokens import EncodedText


class Sampling:
    """What is known of one call of a pipeline; nothing of it outlives the call.

    Args:
        pipe: the pipeline.
        number: number of the call, 0 first.
        options: its arguments by name; `None` for a loop of the user's own, which encodes its prompt itself.
        prompt: what the prompt is where the pipeline is given embeddings only.
    """

    def __init__(
        self, pipe: VideoPipeline, number: int, options: dict[str, Any] | None, prompt: str | list[str] | None
    ) -> None:
        self.pipe = pipe
        self.number = number
        self.options = options
        self.prompt = RunPrompt(pipe, options, prompt)
        self.steps = 0  # begun; FreeInit makes several rounds of them in one run
        self.memory: dict[Any, Any] = {}  # what methods keep for the length of the run
        self.end_step()

    def end_step(self) -> None:
        """Forgets what belongs to one denoising step."""
        self._seen: set[Branch] = set()
        self._prompted: torch.Tensor | None = None  # the text of the first call with the prompt

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

    @property
    def samples(self) -> int:
        """How many videos are made at once."""
        return self.prompt.samples

    def texts(self) -> list[EncodedText]:
        """The prompt of each video; see `RunPrompt.texts`."""
        return self.prompt.texts()

    # -- which sample is what

    def branches(self, model: Model, batch: int, arguments: Mapping[str, Any]) -> tuple[Branch, ...]:
        """Which branch each sample of a denoiser call belongs to.

        Args:
            model: table entry of the denoiser.
            batch: samples of the call.
            arguments: arguments of the call, by name.

        Raises:
            ArgumentError: for a batch that is no known multiple of the number of videos, or whose text is not there
                for each of its videos.
        """
        samples, text = self.samples, model.text(arguments)
        if not model.batched_branches and text.shape[0] == samples < batch:
            raise ArgumentError(
                f"num_videos_per_prompt must be 1 on {type(self.pipe).__name__}, which does not repeat its text for "
                f"more videos (the denoiser was given {batch}, and the text of {samples}): ask for several by a list "
                "of prompts"
            )
        disturbed = bool(getattr(self.pipe, "do_perturbed_attention_guidance", False))
        guided = bool(getattr(self.pipe, "do_classifier_free_guidance", True))
        if batch == samples and not model.batched_branches:
            kinds: tuple[Branch, ...] = (self._branch_by_text(text),)
        elif batch == samples:
            changed = model.disturbed is not None and model.disturbed(arguments)
            kinds = ("perturbed",) if changed else ("cond",)
        elif batch == 2 * samples:
            kinds = ("cond", "perturbed") if disturbed and not guided else ("uncond", "cond")
        elif batch == 3 * samples and disturbed:
            kinds = ("uncond", "cond", "perturbed")
        else:
            raise ArgumentError(
                f"the denoiser was called with a batch of {batch} for {samples} video(s): which samples see the "
                f"prompt is not known of {type(self.pipe).__name__}"
            )
        self._seen |= set(kinds)
        if "cond" in kinds:
            batch = samples * len(kinds)
            self.prompt.note_text(text, kinds.index("cond") * samples, batch)
        return tuple(kind for kind in kinds for _ in range(samples))

    def _branch_by_text(self, text: torch.Tensor) -> Branch:
        """The branch of a call that holds one of them only."""
        guider = getattr(self.pipe, "guider", None)
        if hasattr(guider, "is_conditional"):
            return self._branch_by_guider(guider, text)
        prompted = self._same(text, self.prompt.embeddings)
        if self._same(text, self.prompt.negative):  # if the prompts are equal, the prompt's call is the first
            return "uncond" if not prompted or "cond" in self._seen else "cond"
        return "cond" if prompted or "cond" not in self._seen else "uncond"

    def _branch_by_guider(self, guider: Any, text: torch.Tensor) -> Branch:
        """The branch of a call that a guider has prepared; a second one with the prompt is disturbed."""
        again = "cond" in self._seen
        if getattr(guider, "_count_prepared", 1):
            if not guider.is_conditional:
                return "uncond"
            return "perturbed" if again else "cond"
        # SmoothedEnergyGuidance forgets to count its calls, which is what `is_conditional` looks at. As every guider
        # it has the prompt's call first; another with the same text is without the prompt only if the prompts are
        # equal.
        if not again:
            self._prompted = text
            return "cond"
        if not self._same(text, self._prompted):
            return "uncond"
        equal = self._same(text, self.prompt.negative) and "uncond" not in self._seen
        return "uncond" if equal else "perturbed"

    @staticmethod
    def _same(text: torch.Tensor, embeddings: torch.Tensor | None) -> bool:
        if embeddings is None or flat(text).shape != flat(embeddings).shape:
            return False
        return torch.equal(flat(text), flat(embeddings).to(text.device, text.dtype))
