"""Taps on attention layers: added, taken off, asked before a compiled network runs, and handed what it has left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cvg_kernels.pipeline.attention import Place
from cvg_kernels.pipeline.interception import intercepting
from cvg_kernels.pipeline.layers import Layer, give_processor
from cvg_kernels.pipeline.tap import SLOT, Plan, Samples, Tap, Turns, backend_of, disturbs_samples, requests_of
from cvg_kernels.pipeline.uninterrupted import each_of, uninterrupted


@dataclass
class _Tapped:
    """The taps of one layer."""

    layer: Layer
    taps: list[Tap]
    #: (intercepting processor, the one that it was made of) of every processor that the layer has had meanwhile.
    processors: list[tuple[Any, Any]]
    #: For graphs that hold the layer; without one they break off before it.
    plan: Plan | None = None

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # a copy of the layer has none

    def intercept(self) -> None:
        """Gives the present processor the derived class, if it has it not."""
        module = self.layer.module
        for ours, stock in self.processors:
            if module.processor is ours:
                return
            if module.processor is stock:
                give_processor(module, ours)
                return
        self.processors.append((intercepting(module.processor), module.processor))
        give_processor(module, self.processors[-1][0])

    def decide(self, turns: Turns) -> None:
        """Asks the taps what a graph shall do."""
        taps = [tap for tap in self.taps if tap.active()]
        if not all(tap.foreseen for tap in taps):
            self.plan = None
            return
        disturbs = disturbs_samples(self.layer.module.processor.__class__)
        requests = requests_of(taps, Place(self.layer, self.layer.text_call or 0, disturbs))
        computes = any(tap.computes for tap in taps)
        self.plan = Plan(requests, computes, backend_of(taps, requests), disturbs, turns)

    def decide_at_once(self) -> None:
        """Makes the plan that holds outside of `decide`: that of taps which need not be asked at every call."""
        self.plan = None
        if all(tap.constant for tap in self.taps):
            self.decide(Turns())

    def release(self) -> None:
        """Gives the layer the processor that it would have without us."""
        module = self.layer.module
        for ours, stock in self.processors:
            if module.processor is ours:
                give_processor(module, stock)


def add_tap(layer: Layer, tap: Tap) -> None:
    """Adds a tap to an attention layer.

    Args:
        layer: layer of a diffusers model.
        tap: what takes part from now on.
    """
    module = layer.module
    tapped = vars(module).get(SLOT)
    fresh = tapped is None
    if fresh:
        tapped = vars(module)[SLOT] = _Tapped(layer, [], [])
    tapped.taps.append(tap)
    try:
        if fresh:
            tapped.intercept()
        tapped.decide_at_once()
    except BaseException:
        remove_tap(layer, tap)
        raise


def remove_tap(layer: Layer, tap: Tap) -> None:
    """Takes a tap off; with the last one the layer has its processor back, or one that was set meanwhile.

    Args:
        layer: an attention layer.
        tap: one that was added; others are left alone, so the order of leaving does not matter.
    """
    module = layer.module
    tapped = vars(module).get(SLOT)
    if tapped is None or not any(one is tap for one in tapped.taps):
        return
    tapped.taps = [one for one in tapped.taps if one is not tap]
    if tapped.taps:
        tapped.decide_at_once()
    else:
        tapped.release()
        del vars(module)[SLOT]


def is_tapped(layer: Layer) -> bool:
    """Says whether the taps of a layer take part: not where another processor was set since they were added.

    Args:
        layer: with or without taps.
    """
    tapped = vars(layer.module).get(SLOT)
    return tapped is not None and any(layer.module.processor is ours for ours, _ in tapped.processors)


def keep_taps(layer: Layer) -> None:
    """Puts a layer's taps on the processor that somebody has set since they were added.

    Args:
        layer: with or without taps.
    """
    tapped = vars(layer.module).get(SLOT)
    if tapped is not None:
        tapped.intercept()


def decide(layers: Sequence[Layer]) -> None:
    """Asks the taps of some layers what they want of the next call of a graph that holds the layers.

    Args:
        layers: with or without taps.
    """
    turns = Turns()
    for layer in layers:
        tapped = vars(layer.module).get(SLOT)
        if tapped is not None:
            tapped.decide(turns)


def collect(layers: Sequence[Layer]) -> None:
    """Hands over the maps that a graph has left, in the order in which the layers ran.

    Args:
        layers: that it holds, with or without taps.
    """
    left = []
    for layer in layers:
        tapped = vars(layer.module).get(SLOT)
        if tapped is not None and tapped.plan is not None and tapped.plan.found:
            left.append((layer, tapped.plan))
    for layer, plan in sorted(left, key=lambda pair: pair[1].turn):
        found, plan.found, samples = plan.found, (), Samples()
        for number, maps in found:
            samples.hand_over(Place(layer, number, plan.disturbs), plan.requests, maps)


@contextmanager
def tapped(taps: Sequence[tuple[Layer, Tap]]) -> Iterator[None]:
    """Taps of several layers for the length of a `with` block.

    Args:
        taps: pairs of a layer and what takes part in it.
    """
    try:
        for layer, tap in taps:
            add_tap(layer, tap)
        yield
    finally:
        uninterrupted(each_of, remove_tap, list(taps))
