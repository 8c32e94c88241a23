"""A text of its own for every frame, in the place of the prompt's: VSTAR's synopsis in the layers of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cvg_kernels.guidance.synopsis import frame_texts, place_texts
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.session import PipelineSession


class FrameTexts:
    """Gives the text layers of a network the states of a synopsis.

    Args:
        states: prompt → the states of its video.
        reads_prompt: whether the states depend on the prompt.
        session: says which call is under way.
    """

    def __init__(self, states: Callable[[str], list[str]], reads_prompt: bool, session: PipelineSession) -> None:
        self._states = states
        self._reads_prompt = reads_prompt
        self._session = session

    def give(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before a text layer: puts the text of each frame in the place of the prompt's, for conditional samples."""
        given = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        call = self._session.call_now()
        if call is None:
            return None
        conditional = [sample for sample, branch in enumerate(call.branches) if branch != "uncond"]
        if not conditional:
            return None
        # An IP-Adapter hands its image tokens over beside the text.
        text, *beside = given if isinstance(given, tuple) else (given,)
        texts = call.sampling.remember((id(self), call.denoiser), lambda: self._encode(call))
        if texts is None:
            return None
        each = [texts[sample % len(texts)] for sample in conditional]
        text, mask = place_texts(text, conditional, each)
        if mask is not None:
            kwargs = {**kwargs, "attention_mask": mask}
        if not call.own:
            self._session.run.mark(call)
        text = (text, *beside) if beside else text
        if "encoder_hidden_states" in kwargs:
            return args, {**kwargs, "encoder_hidden_states": text}
        return (args[0], text, *args[2:]), kwargs

    @torch.no_grad()
    def _encode(self, call: Call) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """The text of every frame of each video as its layers are given it, and which tokens a frame has.

        `None` if the only state of every prompt is the prompt itself.
        """
        prompts = call.prompts if self._reads_prompt else [""] * call.sampling.samples
        if all(self._states(prompt) == [prompt] for prompt in prompts):
            self._session.run.notes["one state"] = {"the prompt is its only state"}
            return None
        embeddings = []
        for prompt in prompts:
            states = call.sampling.prompt.encode(self._states(prompt), call.text.device)
            texts, has_token = frame_texts([state.to(call.text.dtype) for state in states], call.latents.shape[2])
            projection = call.model.text_projection
            embeddings.append((texts if projection is None else getattr(call.denoiser, projection)(texts), has_token))
        return embeddings
