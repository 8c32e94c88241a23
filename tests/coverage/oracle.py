"""What attention does in a pipeline, seen from outside: hooks of torch and a spy on its function, and none of our
code.

Nothing is known of a model but where its tokens of text mix (`facts.MIXERS`): where a word stands among the keys of a
layer is found by disturbing what the text encoder says of that word, and looking which keys move.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from tests.pipelines import denoisers


@dataclass
class Seen:
    """One attention: in which call of a denoiser, by which layer, the how many-eth of that layer in that call."""

    call: int
    layer: str
    number: int
    query: torch.Tensor  # [B', heads, N, D]
    key: torch.Tensor  # [B', heads, M, D]
    mask: torch.Tensor | None
    scale: float | None
    causal: bool

    @property
    def name(self) -> tuple[str, int]:
        return self.layer, self.number

    def maps(self, words: list[list[int]]) -> torch.Tensor:
        """Softmax in float64, mean over heads: what every query gives the keys of each word, `[B', words, N]`."""
        query, key = self.query.double(), self.key.double()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped heads
        logits = query @ key.mT * (self.scale or query.shape[-1] ** -0.5)
        if self.mask is not None:
            hidden = self.mask.dtype == torch.bool
            logits = logits.masked_fill(~self.mask, -torch.inf) if hidden else logits + self.mask
        if self.causal:
            logits = logits.masked_fill(torch.ones(logits.shape[-2:]).tril().logical_not(), -torch.inf)
        maps = logits.softmax(-1).mean(1)
        return torch.stack([maps[..., at].sum(-1) for at in words], 1)


@dataclass
class Call:
    """A call of a denoiser."""

    denoiser: nn.Module
    args: tuple
    arguments: dict[str, Any]
    output: torch.Tensor | None = None

    @property
    def latents(self) -> torch.Tensor:
        """What the denoiser is given to denoise."""
        names = [name for name in ("sample", "hidden_states") if name in self.arguments]
        return self.arguments[names[0]] if names else self.args[0]


@dataclass
class Watch:
    """What a run was seen to do."""

    calls: list[Call] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    #: (call, module, the how many-eth time in it) → what a module in which tokens of text mix was given and answered.
    mixed: dict[tuple[int, str, int], tuple[torch.Tensor, Any]] = field(default_factory=dict)

    def of_call(self, number: int) -> dict[tuple[str, int], Seen]:
        return {seen.name: seen for seen in self.seen if seen.call == number}


class Enough(Exception):
    """Ends a run of which no more is wanted."""


def network_of(denoiser: nn.Module) -> nn.Module:
    """The network inside a wrapper of PEFT, whose names our records have."""
    return denoiser.get_base_model() if hasattr(denoiser, "get_base_model") else denoiser


@contextmanager
def hooked(hooks: list[tuple[nn.Module, str, Callable]]) -> Iterator[None]:
    """Hooks for the length of a block: (module, "pre" or "post", function of module, args, arguments[, output])."""
    handles = []
    for module, when, function in hooks:
        register = module.register_forward_pre_hook if when == "pre" else module.register_forward_hook
        handles.append(register(function, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(
    networks: list[nn.Module],
    *,
    attention: bool = True,
    keep_graph: bool = False,
    mixing: Sequence[tuple[str, nn.Module]] = (),
) -> Iterator[Watch]:
    """Notes every call of some networks in a block, and every attention in them.

    Args:
        networks: the denoisers.
        attention: whether attention is spied on; if not, its function is left alone.
        keep_graph: whether queries and keys stay on the graph.
        mixing: modules whose inputs and outputs are noted too, by name.
    """
    found = Watch()
    stack: list[str] = []  # the modules that are running, the innermost last
    counts, times = Counter(), Counter()
    stock = functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        if stack:
            layer = stack[-1].removesuffix(".processor")
            at = (len(found.calls) - 1, layer)
            kept = (query, key) if keep_graph else (query.detach().clone(), key.detach().clone())
            found.seen.append(Seen(*at, counts[at], *kept, attn_mask, scale, is_causal))
            counts[at] += 1
        return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)

    def begin(module, args, arguments):
        found.calls.append(Call(module, *_copied((args, arguments))))

    def end(module, args, arguments, output):
        answer = output[0]  # none where a call only fills a cache
        found.calls[-1].output = None if answer is None else answer.detach().clone()

    def entering(name):
        return lambda module, args, arguments: stack.append(name)

    def leave(module, args, arguments, output):
        stack.pop()

    def noting(name):
        def note(module, args, arguments, output):
            at = (len(found.calls) - 1, name)
            found.mixed[(*at, times[at])] = (_first(args, arguments), output)
            times[at] += 1

        return note

    hooks: list[tuple[nn.Module, str, Callable]] = []
    for network in networks:
        hooks += [(network, "pre", begin), (network, "post", end)]
        for name, module in network.named_modules():
            if name and attention:
                hooks += [(module, "pre", entering(name)), (module, "post", leave)]
    hooks += [(module, "post", noting(name)) for name, module in mixing]
    with hooked(hooks), pytest.MonkeyPatch.context() as patch:
        if attention:
            patch.setattr(functional, "scaled_dot_product_attention", spy)
        yield found


def _first(args: tuple, arguments: dict[str, Any]) -> torch.Tensor:
    """The first sequence of tokens that a module is given."""
    given = [*args, *arguments.values()]
    return next(one for one in given if torch.is_tensor(one) and one.ndim == 3)


# -- where the words stand


@dataclass(frozen=True)
class Places:
    """Where the words stand among the keys.

    Attributes:
        words: for each word, its keys.
        layers: the attentions to the text in one call of a denoiser, (layer, the how many-eth of that layer), in
            order.
        joint: whether the text is among the queries too.
    """

    words: list[list[int]]
    layers: list[tuple[str, int]]
    joint: bool


def places(
    pipe: Any, again: Callable[[], Any], stock: Watch, call: int, words: list[str], mixers: str | None
) -> Places:
    """Finds the keys that belong to words.

    Args:
        pipe: a pipeline.
        again: makes the same run once more.
        stock: what that run was seen to do.
        call: number of a call of the denoiser that is given the prompt.
        words: of the prompt, separated by spaces.
        mixers: full names of the modules in which tokens of text mix: what they answer is disturbed where they are
            given something disturbed, and nowhere else.
    """
    found: dict[str, set[int]] = {}
    layers: list[tuple[str, int]] = []
    joint = False
    before = stock.of_call(call)
    for token in dict.fromkeys(token for word in words for token in word.split()):
        after = _disturbed(pipe, again, stock, call, token, mixers).of_call(call)
        assert after.keys() == before.keys()
        moved = {name: _moved(before[name].key, after[name].key) for name in before}
        if mixers:
            moved = {name: at for name, at in moved.items() if not _within(mixers, name[0])}
        first = next((name for name, at in moved.items() if at), None)
        assert first is not None, f"no key belongs to {token!r}"
        found[token] = moved[first]
        joint = _moved(before[first].query, after[first].query) == moved[first]
        if joint:  # behind the first of them the whole sequence moves
            sizes = before[first].key.shape
            names = [name for name in moved if moved[name] and before[name].key.shape == sizes]
        else:
            names = [name for name, at in moved.items() if at == moved[first]]
        assert not layers or layers == names
        layers = names
    return Places([[at for t in word.split() for at in sorted(found[t])] for word in words], layers, joint)


def mixing(pipe: Any, mixers: str | None) -> list[tuple[str, nn.Module]]:
    """The modules in which tokens of text mix,
    in the denoisers and in the connectors that some pipelines have before.
    """
    if mixers is None:
        return []
    named = [pair for denoiser in denoisers(pipe) for pair in network_of(denoiser).named_modules()]
    if hasattr(pipe, "connectors"):
        named += [(f"connectors.{name}", one) for name, one in pipe.connectors.named_modules()]
    return [(name, module) for name, module in named if re.fullmatch(mixers, name)]


def _copied(arguments: tuple[tuple, dict[str, Any]]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call as they are now: some pipelines step in place."""
    return tree_map_only(torch.Tensor, torch.clone, arguments)


def _within(mixers: str, name: str) -> bool:
    """Whether a module is one of the mixers or inside of one."""
    parts = name.split(".")
    return any(re.fullmatch(mixers, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _moved(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    """The rows of queries or keys `[B', heads, N, D]` that are not as before."""
    change = (after - before).abs().amax((0, 1, 3))
    return set((change > 1e-4 * before.abs().max()).nonzero()[:, 0].tolist())


def _disturbed(pipe: Any, again: Callable[[], Any], stock: Watch, call: int, token: str, mixers: str | None) -> Watch:
    """The run up to the end of a call, with the text encoders' answer for one token moved."""
    ids: list[tuple[torch.Tensor, nn.Module]] = []
    hooks = []
    for name, encoder in text_encoders(pipe):
        number = _id_of(pipe, name, token)
        if number is None:
            continue

        def note(module, args, arguments, encoder=encoder):
            given = arguments.get("input_ids", args[0] if args else None)
            ids.append((given, encoder))

        def disturb(module, args, arguments, output, number=number):
            at = ids[-1][0] == number
            return _bumped(output, at) if bool(at.any()) else None

        hooks += [(encoder, "pre", note), (encoder, "post", disturb)]

    networks = [network_of(denoiser) for denoiser in denoisers(pipe)]
    counts: Counter = Counter()
    seen_calls = [-1]

    def begin(module, args, arguments):
        seen_calls[0] += 1

    def end(module, args, arguments, output):
        if seen_calls[0] == call:
            raise Enough

    def mixed(name):
        def mix(module, args, arguments, output):
            at = (seen_calls[0], name)
            given, answer = stock.mixed[(*at, counts[at])]
            counts[at] += 1
            moved = (_first(args, arguments) - given).abs().amax(-1)
            # a norm over all tokens moves the others too, by less
            return _bumped(answer, (moved > 1e-6) & (moved > moved.max() / 2))

        return mix

    hooks += [(network, "pre", begin) for network in networks]
    hooks += [(module, "post", mixed(name)) for name, module in mixing(pipe, mixers)]
    with ExitStack() as opened:
        opened.enter_context(processors_kept(networks))
        found = opened.enter_context(watched(networks))
        opened.enter_context(hooked(hooks))
        opened.enter_context(hooked([(network, "post", end) for network in networks]))
        opened.enter_context(pytest.raises(Enough))
        again()
    return found


@contextmanager
def processors_kept(networks: list[nn.Module]) -> Iterator[None]:
    """Puts back the processors of layers, which a pipeline that sets some for a run (PAG) leaves when it is
    interrupted.
    """
    layers = [m for network in networks for m in network.modules() if hasattr(m, "set_processor")]
    before = [layer.processor for layer in layers]
    try:
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            if layer.processor is not processor:
                layer.set_processor(processor)


def _bumped(output: Any, at: torch.Tensor) -> Any:
    """Moves an answer's sequences in the places `[B, L]`; what is no such sequence stays."""
    generator = torch.Generator().manual_seed(3)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim != 3 or tensor.shape[:2] != at.shape or not tensor.is_floating_point():
            return tensor
        # not the same for all channels, which a norm would take away
        direction = torch.randn(tensor.shape[-1], generator=generator)
        return tensor + at[..., None] * direction.to(tensor) * tensor.std()

    return tree_map_only(torch.Tensor, move, output)


def text_encoders(pipe: Any) -> list[tuple[str, nn.Module]]:
    """The text encoders of a pipeline, by name."""
    return [
        (name, part)
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    ]


def _id_of(pipe: Any, encoder: str, token: str) -> int | None:
    """The number of a token in the vocabulary of an encoder, if it is there: they have a token a word."""
    tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    vocabulary = tokenizer.get_vocab()
    return vocabulary.get(token)
