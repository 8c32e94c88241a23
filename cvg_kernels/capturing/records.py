"""What a capture keeps, and heat maps made of it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import interpolate

from cvg_kernels.errors import ArgumentError, GuidanceWarning, is_whole
from cvg_kernels.pipeline.geometry import Branch
from cvg_kernels.pipeline.models import Grid
from cvg_kernels.prompts.tokens import TokenSpan, Word, word_and_occurrence


@dataclass(frozen=True)
class Record:
    """The maps of one layer in one denoiser call.

    Attributes:
        run: number of the pipeline's call, 0 first.
        step: number of the denoising step in it, 0 first.
        timestep: timestep of that step.
        layer: dotted path of the attention module.
        kind: which attention the maps are from.
        branch: which samples these are: with the prompt, without it, or disturbed (PAG).
        words: names along the K dimension of cross maps.
        grid: frames, rows, columns.
        maps: float32, cross `[B, K, F, h, w]` (`[B, heads, K, …]` per head), temporal `[B, h·w, F, F]`.
        section: which part of a video that is made part by part in one call (FramePack, Helios, SkyReels-V2's
            diffusion forcing, AnyFlow FAR), or which round through the schedule (FreeInit), 0 first.
    """

    run: int
    step: int
    timestep: float
    layer: str
    kind: Literal["cross", "temporal"]
    branch: Branch
    words: tuple[str, ...]
    grid: Grid
    maps: torch.Tensor
    section: int = 0


def heat_map(
    records: Sequence[Record],
    word: Word,
    occurrence: int,
    branch: Branch,
    sample: int,
    size: tuple[int, int] | None,
    run: int,
    section: int | None,
) -> torch.Tensor:
    """Averages the cross maps of a word; see `Capture.heat_map`."""
    word, occurrence = word_and_occurrence(word if isinstance(word, tuple) else (word, occurrence))
    numbers = {"run": run, "sample": sample, "section": -1 if section is None else section}
    for name, number in numbers.items():
        if not is_whole(number):
            raise ArgumentError(f"{name} must be a whole number, got {number!r}")
    if size is not None and not _is_size(size):
        raise ArgumentError(f"size must be (rows, columns), whole numbers of at least 1, or None, got {size!r}")
    cross = [record for record in records if record.kind == "cross"]
    runs = sorted({record.run for record in cross})
    if not runs:
        raise ArgumentError("heat_map needs captured maps of words; nothing was recorded")
    if not -len(runs) <= run < len(runs):
        raise ArgumentError(f"run must be one of the {len(runs)} captured runs, got {run!r}")
    cross = [record for record in cross if record.run == runs[run]]
    cross = _of_section(cross, section)
    branches = tuple(dict.fromkeys(record.branch for record in cross))
    if branch not in branches:
        raise ArgumentError(f"branch must be one of {', '.join(map(repr, branches))}, got {branch!r}")
    chosen = [record for record in cross if record.branch == branch]
    samples = chosen[0].maps.shape[0]
    if not -samples <= sample < samples:
        raise ArgumentError(f"sample must be one of the {samples} videos of the batch, got {sample!r}")
    place = _place(chosen[0].words, TokenSpan(word, occurrence, ()).label, branch)
    if len({record.grid[0] for record in chosen}) > 1:
        raise ArgumentError("the captured layers have different numbers of frames: choose some with layers=…")
    size = size or max((record.grid[1:] for record in chosen), key=lambda grid: grid[0] * grid[1])

    by_layer: dict[str, dict[int, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for record in chosen:
        maps = record.maps[sample].detach().float().cpu()
        maps = maps.mean(0) if maps.ndim == 5 else maps  # per head
        by_layer[record.layer][record.step].append(maps[place])  # [F, h, w]
    total = torch.zeros(chosen[0].grid[0], *size)
    for by_step in by_layer.values():
        mean = torch.stack([torch.stack(calls).mean(0) for calls in by_step.values()]).mean(0)
        total += interpolate(mean[:, None], size, mode="bicubic", align_corners=False)[:, 0]
    return total / len(by_layer)


def _of_section(records: list[Record], section: int | None) -> list[Record]:
    """The records of one section; without a number the last, which is told where there are others."""
    sections = sorted({record.section for record in records})
    chosen = -1 if section is None else section
    if not -len(sections) <= chosen < len(sections):
        raise ArgumentError(f"section must be one of the {len(sections)} captured sections, got {section!r}")
    if section is None and len(sections) > 1:
        warnings.warn(
            f"the run went through its schedule {len(sections)} times: this is the heat map of the last section (of a "
            "long video) or round (of FreeInit); section=… chooses",
            GuidanceWarning,
            stacklevel=4,
        )
    return [record for record in records if record.section == sections[chosen]]


def _is_size(size: object) -> bool:
    return isinstance(size, (tuple, list)) and len(size) == 2 and all(is_whole(n, 1) for n in size)


def _place(words: tuple[str, ...], label: str, branch: Branch) -> int:
    """Where a word stands among those captured, whatever its case."""
    if label in words:
        return words.index(label)
    folded = [word.casefold() for word in words]
    if label.casefold() in folded:
        return folded.index(label.casefold())
    raise ArgumentError(f"word {label!r} was not captured on branch {branch!r}; captured: {', '.join(words)}")
