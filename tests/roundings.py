"""What roundings do to a whole pipeline, measured: the budget of results that only rounding may tell apart.

A tolerance that somebody chose is right for the networks and the processor it was chosen on. How far a rounding
spreads, through layers, steps of a scheduler and gradients that are followed, the pipeline itself says: it runs again
with each of its weights off by a rounding, up or down at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tests.tolerance import relative_error

_TIMES = 6  # that the weights are off
_FACTOR = 4.0  # times the largest move seen: the moves are random, and those of results of a kind scatter alike


@contextmanager
def rounded_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within it each weight in floating point is off by an eps, up or down, then itself again."""
    weights = {id(p): p for module in modules for p in module.parameters() if p.is_floating_point()}.values()
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1 + torch.finfo(weight.dtype).eps * (torch.randint(0, 2, weight.shape) * 2 - 1))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


def moves(run: Callable[[], list[torch.Tensor]], modules: Iterable[nn.Module]) -> list[float]:
    """How far each result moves, relative to its largest number, where the weights are off by a rounding.

    Args:
        run: what is repeated; gives the results.
        modules: whose weights are off.
    """
    modules, want = list(modules), run()
    found = [0.0] * len(want)
    for _ in range(_TIMES):
        with rounded_weights(modules):
            other = run()
        found = [max(f, _apart(o, w)) for f, o, w in zip(found, other, want, strict=True)]
    return found


def assert_equal_but_for_roundings(found: list[torch.Tensor], want: list[torch.Tensor], moved: list[float]) -> None:
    """Asserts that results are no farther apart than a few times what roundings move them.

    Args:
        found: the results.
        want: what they should be.
        moved: of `moves`; results of as many axes, the losses of all steps for one, share the largest.
    """
    assert len(found) == len(want) == len(moved)
    most = {
        axes: max(m for m, w in zip(moved, want, strict=True) if w.ndim == axes) for axes in {w.ndim for w in want}
    }
    for number, (one, other) in enumerate(zip(found, want, strict=True)):
        allowed = _FACTOR * most[other.ndim] + 4 * torch.finfo(torch.float32).eps
        off = _apart(one, other)
        assert off <= allowed, f"result {number} is off by {off:.3g}, allowed are {allowed:.3g}"


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return relative_error(one.detach().double(), other.detach().double())
