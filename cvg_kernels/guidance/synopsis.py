"""Video synopsis prompting: one prompt becomes several states, and each frame gets its own text in between.

Of "VSTAR: Generative Temporal Nursing for Longer Dynamic Video Synthesis". Who writes the states is left open: a list,
a file, or a writer, which is any callable from a prompt to its states.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.base import check_count, check_number
from cvg_kernels.guidance.endpoint import chat_address, post_json
from cvg_kernels.reading import parse_json, read_bytes, text_of

Writer = Callable[[str], Sequence[str]]

_MOST_FILE = 2**20  # bytes
#: What a writer may answer: every state is encoded and kept.
_MOST_STATES, _MOST_CHARACTERS = 100, 2000
_NUMBERED = re.compile(r"\s*\d+[.)](.*)")

_TASK = (
    "A video is described by one prompt. Write the {states} visual states that it goes through, in order, each as one "
    "short prompt of its own that names everything to be seen. One state a line, numbered, nothing else.\nPrompt: "
    "{prompt}"
)


def read_states(path: str | Path) -> list[str]:
    """Reads states from a file: a JSON list, or one a line.

    Raises:
        ArgumentError: if there is no such file, or no state in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ArgumentError(f"prompts must be a list, a writer or a file, got {str(path)!r}")
    try:
        text = text_of(read_bytes(path, most=_MOST_FILE), path)
    except OSError as error:
        raise ArgumentError(f"prompts cannot be read: {error}") from None
    states = parse_json(text, path) if path.suffix == ".json" else text.splitlines()
    if not isinstance(states, list) or not all(isinstance(state, str) for state in states):
        raise ArgumentError(f"prompts must be a list of strings, got another file: {path}")
    return checked_states([state.strip() for state in states if state.strip()], str(path))


def checked_states(states: Sequence[str], source: str) -> list[str]:
    """The states as a list.

    Raises:
        ArgumentError: unless they are strings, and at least one.
    """
    several = isinstance(states, Iterable) and not isinstance(states, (str, bytes, Mapping))
    listed = list(states) if several else []
    if not listed or not all(isinstance(state, str) and state.strip() for state in listed):
        given = listed if several else states
        raise ArgumentError(f"prompts must be strings and at least one, got {given!r} from {source}")
    return listed


def split_at_then(prompt: str) -> list[str]:
    """The writer that needs no model: the parts of a prompt between its "then"s.

    "a red circle moving left, then a blue circle moving left" has two states.
    """
    return [part for part in re.split(r"[,;.]?\s*\bthen\b\s*", prompt) if part.strip()]


def endpoint_writer(url: str, model: str, *, states: int = 4, key: str | None = None, seconds: float = 60.0) -> Writer:
    """A writer behind an OpenAI-compatible chat endpoint.

    Its reply is data: at most 1 MiB, at most `seconds` in all, no redirects. The key goes to that address and nowhere
    else, and stands in no error.

    Args:
        url: address of the API, up to and including its version, e.g. `http://localhost:8000/v1`.
        model: name of the model there.
        states: how many to ask for.
        key: bearer token; `None` takes the environment variable `OPENAI_API_KEY`, if set.
        seconds: to wait at most.

    Raises:
        ArgumentError: for an address that is none, or holds a password; when it writes, if no states come back.
    """
    address = chat_address(url)
    check_count("states", states, 1)
    check_number("seconds", seconds, high=86400, above=0)

    def write(prompt: str) -> list[str]:
        content = _TASK.format(states=states, prompt=prompt)
        body = {"model": model, "messages": [{"role": "user", "content": content}]}
        token = key or os.environ.get("OPENAI_API_KEY")
        reply = post_json(address, body, token=token, seconds=seconds)
        try:
            answer = reply["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            raise ArgumentError(
                f"the writer at {address} gave no states: its reply has no choices[0].message.content"
            ) from None
        return numbered_lines(answer)

    return write


def local_writer(generate: Callable[..., Any], *, states: int = 4, tokens: int = 300) -> Writer:
    """A writer on a `transformers` text-generation pipeline.

    Args:
        generate: what `transformers.pipeline("text-generation", …)` returns.
        states: how many to ask for.
        tokens: the most it may write.
    """

    def write(prompt: str) -> list[str]:
        messages = [{"role": "user", "content": _TASK.format(states=states, prompt=prompt)}]
        answer = generate(messages, max_new_tokens=tokens)[0]["generated_text"]
        return numbered_lines(answer if isinstance(answer, str) else answer[-1]["content"])

    return write


def numbered_lines(answer: str) -> list[str]:
    """The lines "1. …" or "1) …" of an answer, without their numbers.

    Raises:
        ArgumentError: if there is none, or more than any video has states.
    """
    if not isinstance(answer, str):
        raise ArgumentError(f"the writer's answer must be text, got {type(answer).__name__}")
    found = (_NUMBERED.match(line) for line in answer.splitlines())
    lines = [line for each in found if each is not None and (line := each.group(1).strip())]
    if not lines:
        raise ArgumentError(f"the writer's answer has no numbered lines: {answer[:200]!r}")
    if len(lines) > _MOST_STATES or max(map(len, lines)) > _MOST_CHARACTERS:
        raise ArgumentError(
            f"the writer's answer must have at most {_MOST_STATES} lines of {_MOST_CHARACTERS} characters, got "
            f"{len(lines)} of up to {max(map(len, lines))}"
        )
    return lines


def interpolate_states(embeddings: torch.Tensor, frames: int) -> torch.Tensor:
    """Text embeddings of every frame, blended between those of the states.

    The states stand at frames linspace(0, F − 1, n); a frame at β between two of them gets (1 − β) e_i + β e_{i+1}.
    (The released code rounds those places to whole frames.)

    Args:
        embeddings: `[n, tokens, C]`.
        frames: F.

    Returns:
        `[F, tokens, C]`.
    """
    count = embeddings.shape[0]
    position = torch.linspace(0, count - 1, frames, device=embeddings.device, dtype=torch.float32)
    before = position.floor().long().clamp(max=max(count - 2, 0))
    after = (before + 1).clamp(max=count - 1)
    blend = (position - before).view(-1, 1, 1)
    return ((1 - blend) * embeddings[before].float() + blend * embeddings[after].float()).to(embeddings.dtype)


def frame_texts(embeddings: Sequence[torch.Tensor], frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text embeddings of every frame from those of the states, which need not be equally long.

    Args:
        embeddings: text embeddings of the states in order, each `[tokens, C]`; the shorter are padded with zeros.
        frames: F.

    Returns:
        The text `[F, tokens, C]`, and bool `[F, tokens]`: whether a state that the frame is made of has the token.
    """
    ones = [one.new_ones(one.shape[0], 1, dtype=torch.float32) for one in embeddings]
    text = interpolate_states(pad_sequence(list(embeddings), batch_first=True), frames)
    token_weight = interpolate_states(pad_sequence(ones, batch_first=True), frames)
    return text, token_weight[..., 0] > 0


def place_texts(
    text: torch.Tensor, samples: Sequence[int], texts: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Puts the text of every frame in the place of a prompt's, for some samples of a batch.

    Args:
        text: text embeddings of the batch, `[B·F, tokens, C]`.
        samples: which samples.
        texts: for each of them, what `frame_texts` gave.

    Returns:
        The text `[B·F, longest, C]`, and a mask `[B·F, 1, longest]` to be added to the logits, 0 or −10⁴; `None` where
        every frame has all tokens.
    """
    frames = texts[0][0].shape[0]
    own = list(text.split(frames))
    seen = [one.new_ones(one.shape[:2], dtype=torch.bool) for one in own]
    for sample, (given, has_token) in zip(samples, texts, strict=True):
        own[sample], seen[sample] = given, has_token
    tokens = max(one.shape[1] for one in own)
    text = torch.cat([pad(one, (0, 0, 0, tokens - one.shape[1])) for one in own])
    keep = torch.cat([pad(one, (0, tokens - one.shape[1])) for one in seen])
    if keep.all():
        return text, None
    return text, torch.zeros_like(keep, dtype=text.dtype).masked_fill(~keep, -1e4)[:, None]
