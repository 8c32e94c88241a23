"""What a pipeline's `encode_prompt` does to a prompt, found by letting it run with stand-ins for the text encoders.

A stand-in is given the ids that its text encoder would be given, and answers with rows that can be told apart. Where
they come out is where the tokens stand in the text that the pipeline makes: behind a template that was cropped, among
a selection, moved. Nothing is computed, and the text encoders need not be there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cvg_kernels.pipeline.signatures import naming_signature
from cvg_kernels.pipeline.text_rows import Marks, Rows, among, flat
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.encoding import Template, without_padding

#: Prompts that share neither their first nor their last token: what their ids have in common is the template.
_PROBES = ("a", "the")

#: What a rehearsal asks for, of the arguments that there are: one text, alone, from the beginning.
_ASKED = {
    "prompt_2": None,
    "prompt_3": None,
    "negative_prompt": None,
    "negative_prompt_2": None,
    "num_images_per_prompt": 1,
    "num_videos_per_prompt": 1,
    "do_classifier_free_guidance": False,
    "device": torch.device("cpu"),
    "lora_scale": None,
    "clip_skip": None,
}


@dataclass(frozen=True)
class Reading:
    """How a text encoder reads a prompt.

    Attributes:
        encoder: name of the pipeline's component.
        ids: that it is given.
        rows: per token of the text that is made of it, the position among `ids`.
    """

    encoder: str
    ids: tuple[int, ...]
    rows: Rows


def text_encoders(pipe: VideoPipeline) -> list[str]:
    """Names of a pipeline's text encoders, also of those that are not loaded."""
    names = ("text_encoder", *(f"text_encoder_{number}" for number in range(2, 5)))
    return [name for name in names if hasattr(pipe, name)]


class Rehearsal:
    """Runs `encode_prompt` with stand-ins.

    Args:
        pipe: a pipeline that has it.
        options: arguments by name, as in the call that is rehearsed.
    """

    def __init__(self, pipe: VideoPipeline, options: dict[str, Any]) -> None:
        self.pipe = pipe
        kind = type(pipe)
        self._known = naming_signature(kind, "encode_prompt", "prompt").parameters
        given = {
            name: value
            for name, value in options.items()
            if name in self._known and not (torch.is_tensor(value) and ("embed" in name or "mask" in name))
        }
        self._options = given | {n: to for n, to in _ASKED.items() if n in self._known}
        self._run = kind.encode_prompt
        self._asked: list[tuple[str, torch.Tensor]] = []
        self._marks = Marks()

    def read(self, prompts: Sequence[str], length: int | None = None) -> list[Reading]:
        """Reads prompts as the pipeline would, all at once.

        Args:
            prompts: to read.
            length: tokens that the text shall have, if `max_sequence_length` can bring it about.

        Returns:
            One reading a prompt, of the text encoder that most of the text's rows come from.

        Raises:
            Exception: whatever `encode_prompt` raises when it meets the stand-ins.
            LookupError: if no row of the text is one of a text encoder's.
        """
        text = self._encode(prompts)
        longest = self._options.get("max_sequence_length", self._default("max_sequence_length"))
        if length not in (None, text.shape[1]) and isinstance(longest, int):
            self._options["max_sequence_length"] = longest + length - text.shape[1]
            text = self._encode(prompts)
        return [self._reading(rows) for rows in text]

    def template(self, encoder: str) -> Template:
        """The tokens that a text encoder is given around any prompt.

        Args:
            encoder: its name.
        """
        one, other = (self._probe(text, encoder) for text in _PROBES)
        most = min(len(one), len(other))
        before = next((index for index in range(most) if one[index] != other[index]), most)
        after = next((n for n in range(most - before) if one[-1 - n] != other[-1 - n]), 0)
        return Template(one[:before], one[len(one) - after :])

    def _probe(self, text: str, encoder: str) -> tuple[int, ...]:
        self._encode([text])
        ids = next(ids for name, ids in self._asked if name == encoder)[0].tolist()
        return without_padding(tokenizer_of(self.pipe, encoder), ids)[1]

    def _reading(self, text: torch.Tensor) -> Reading:
        numbers = self._marks.find(text)
        best, start = None, 0
        for name, ids in self._asked:
            for row in ids.tolist():
                rows = among(numbers, start, len(row))
                start += len(row)
                found = sum(token is not None for token in rows)
                if found and (best is None or found > best[0]):
                    best = found, Reading(name, tuple(row), rows)
        if best is None:
            raise LookupError("no row of the text is one that a text encoder returned")
        return best[1]

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """The text `[B, L, C]` that the pipeline makes of the stand-ins' rows."""
        self._asked, self._marks = [], Marks()
        options = dict(self._options)
        if "batch_size" in self._known:
            options["batch_size"] = len(prompts)
        options["prompt"] = prompts[0] if len(prompts) == 1 else list(prompts)
        with self._stand_ins(), _without_warnings():
            result = self._run(self.pipe, **options)
        return flat(result[0] if isinstance(result, (tuple, list)) else result).cpu()

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        """Puts them where `encode_prompt` finds them; the pipeline's own registration of components is passed by."""
        place = vars(self.pipe)
        before = dict(place)
        for name in text_encoders(self.pipe):
            place[name] = _StandIn(getattr(self.pipe, name), name, self._answer)
        try:
            yield
        finally:
            for name in text_encoders(self.pipe):
                place.pop(name)
            place.update({name: before[name] for name in before if name not in place})

    def _answer(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        self._asked.append((name, ids))
        return self._marks.take(*ids.shape).to(ids.device)

    def _default(self, name: str) -> Any:
        return self._known[name].default if name in self._known else None


class _StandIn:
    """Answers for a text encoder; what it is asked beside is answered by the real one, if there is one."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, encoder: nn.Module | None, name: str, answer: Any) -> None:
        self._encoder = encoder
        self._name = name
        self._answer = answer
        self.config = _Narrow(getattr(encoder, "config", None))

    def __call__(self, *args: Any, **kwargs: Any) -> _Output:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not torch.is_tensor(ids) or ids.ndim != 2:
            raise LookupError(f"{self._name} is called without input_ids")
        rows = self._answer(self._name, ids)
        pooled_first = type(self._encoder).__name__.endswith("WithProjection")
        return _Output(rows, self.config.layers, pooled_first)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def parameters(self) -> Iterator[torch.Tensor]:
        """One, on the device where the rehearsal takes place."""
        yield torch.zeros(1)

    def modules(self) -> Iterator[nn.Module]:
        """None, so that no hook of an offloaded text encoder names another device."""
        return iter(())


class _Narrow:
    """A text encoder's configuration, as wide as the stand-in's rows."""

    hidden_size = d_model = Marks.CHANNELS

    def __init__(self, config: Any) -> None:
        self._config = config
        sizes = (getattr(config, "text_config", None), config)
        self.layers = next((n for n in (getattr(c, "num_hidden_layers", None) for c in sizes) if n), 64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class _Output:
    """What a stand-in returns: the same rows in every layer."""

    def __init__(self, rows: torch.Tensor, layers: int, pooled_first: bool) -> None:
        self.last_hidden_state = rows
        self.hidden_states = (rows,) * (layers + 1)
        self.pooler_output = self.text_embeds = rows[:, 0]
        self._items = (self.text_embeds, rows) if pooled_first else (rows, self.pooler_output)

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self._items[key]


def tokenizer_of(pipe: VideoPipeline, encoder: str) -> Any:
    """The tokenizer that belongs to a text encoder, `None` if the pipeline has none.

    Args:
        pipe: theirs.
        encoder: name of the text encoder.
    """
    own = getattr(pipe, encoder.replace("text_encoder", "tokenizer"), None)
    tokenizer = getattr(pipe, "tokenizer", None) if own is None else own
    return getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of texts and images


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Truncation was warned of when the prompt was encoded in earnest."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
