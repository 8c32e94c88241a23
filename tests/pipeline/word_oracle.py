"""What a pipeline gives its text encoders and its denoiser, heard by hooks of torch alone, and the check of words by
it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch

from cvg_kernels.pipeline.exchange import exchange
from cvg_kernels.pipeline.listening import listening
from cvg_kernels.pipeline.prompt import RunPrompt
from cvg_kernels.pipeline.signatures import named_arguments
from tests.pipelines import PIPELINES, PROMPT, denoisers, run

_ENCODERS = ("text_encoder", "text_encoder_2")


class _Stop(Exception):
    """The denoiser was given what the test wants to see."""


@dataclass
class Seen:
    """What a run gave the text encoders and the denoiser, and what the package makes of it."""

    prompt: RunPrompt
    given: list[tuple[str, torch.Tensor, list[torch.Tensor]]] = field(default_factory=list)
    encoded: list[Any] = field(default_factory=list)  # what encode_prompt returned
    text: torch.Tensor | None = None  # of the samples with the prompt


def seen(name: str, pipe: Any, options: dict[str, Any], own: Any = None, **changes: Any) -> Seen:
    """Runs a pipeline until its denoiser is given the prompt."""
    call = {"prompt": PROMPT, **options, **changes}
    if call["prompt"] is None:  # embeddings are given
        del call["prompt"]
    found = Seen(RunPrompt(pipe, call, own))
    case = PIPELINES[name]

    def encoded(stock, *args, **kwargs):
        result = stock(*args, **kwargs)
        if not found.prompt._rehearsing:
            found.encoded.append(result)
        arguments = named_arguments(type(pipe), "encode_prompt", "prompt", args, kwargs)
        found.prompt.note_encoding(arguments, result)
        return result

    def denoised(module, args, kwargs):
        text = kwargs["encoder_hidden_states"]
        branches = case.branches if case.batched else ("cond",)
        batch = found.prompt.samples * len(branches)
        start = branches.index("cond") * found.prompt.samples
        found.prompt.note_text(text, start, batch)
        each = text.shape[0] // batch
        text = text.reshape(text.shape[0], -1, text.shape[-1])
        found.text = text[start * each : (start + found.prompt.samples) * each : each]
        raise _Stop

    with contextlib.ExitStack() as stack:
        if hasattr(type(pipe), "encode_prompt"):
            stack.callback(exchange(pipe, {"encode_prompt": encoded}))
        for remove in listening(pipe, found.prompt):
            stack.callback(remove)
        for encoder in _ENCODERS:
            if isinstance(getattr(pipe, encoder, None), torch.nn.Module):
                hook = _heard(found, encoder)
                module = getattr(pipe, encoder)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for denoiser in denoisers(pipe):
            hook = denoiser.register_forward_pre_hook(denoised, with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(contextlib.suppress(_Stop))
        run(pipe, call, prompt=call.get("prompt"))
    assert found.text is not None
    return found


def _heard(found: Seen, encoder: str):
    def hook(module, args, kwargs, output):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        states = output.hidden_states if output.get("hidden_states") is not None else (output[0],)
        states = [state for state in states if state.ndim == 3]
        if output.get("last_hidden_state") is not None:
            states.append(output["last_hidden_state"])
        found.given.append((encoder, ids, states))

    return hook


def standard(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    return (rows - rows.mean(-1, keepdim=True)) / (rows.std(-1, keepdim=True) + 1e-8)


def sources(row: torch.Tensor, found: Seen) -> set[tuple[int, int, int]]:
    """Calls of text encoders, texts in them, and tokens whose hidden state a row of the denoiser's text is."""
    places = set()
    for call, (_, ids, states) in enumerate(found.given):
        for state in states:
            channels = state.shape[-1]
            if len(row) < channels or state.shape[:2] != ids.shape:
                continue
            parts = [(row[:channels], state), (row[-channels:], state)]
            if len(row) > channels and len(row) % channels == 0:
                parts.append((row[:: len(row) // channels], state))
            parts.append((standard(row[:channels]), standard(state)))
            for part, of in parts:
                same = torch.isclose(of.double(), part.double(), rtol=1e-5, atol=1e-7).all(-1)
                places |= {(call, *place) for place in map(tuple, same.nonzero().tolist())}
    return places


def own_tokens(ids: list[int], prompt: str, tokenizer: Any) -> list[int]:
    """Places of a prompt's words among ids:
    the one place where they stand together, as far as they were not cut off.
    """
    wanted = tokenizer.convert_tokens_to_ids(prompt.split())
    common = [
        next((n for n, (a, b) in enumerate(zip(ids[at:], wanted, strict=False)) if a != b), None)
        for at in range(len(ids))
    ]
    lengths = [min(len(wanted), len(ids) - at) if n is None else n for at, n in enumerate(common)]
    start = lengths.index(max(lengths))
    if lengths.count(max(lengths)) > 1:
        raise ValueError("the text of another prompt")
    return list(range(start, start + max(lengths)))


def check(found: Seen, prompts: list[str], words: list[Any], pipe: Any) -> None:
    """Every token of a word is the hidden state of its id, at its place in its own prompt."""
    tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
    texts = found.prompt.texts()
    assert len(texts) == len(prompts) == len(found.text)
    for text, prompt, rows in zip(texts, prompts, found.text, strict=True):
        assert text.length == len(rows)
        for span in text.find(words):
            (at,) = span.ids
            places = [p for p in sources(rows[at], found) if found.given[p[0]][0] == "text_encoder"]
            matching = []
            for call, sample, token in places:
                ids = found.given[call][1][sample].tolist()
                with contextlib.suppress(ValueError):  # the text of another prompt
                    own = own_tokens(ids, prompt, tokenizer)
                    said = [place for place in own if ids[place] == ids[token]]
                    word = tokenizer.convert_ids_to_tokens(ids[token])
                    matching.append((word, token in own and said.index(token)))
            assert (span.word, span.occurrence) in matching, (span, prompt, places)
