"""`cvg-kernels scenes attribution`: which kind of map lies best on the objects that words name, in clips known
exactly.

A true clip is noised and the denoiser called once with its caption; the maps of each noun are compared with the mask
of its object, at every level of noise, for objects that stand, move slowly and move quickly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, interpolate

from cvg_kernels.guidance.flow_graph import Group, flow_groups, flow_of
from cvg_kernels.intervals import mean, paired_difference
from cvg_kernels.pipeline.layer_capture import LayerCapture
from cvg_kernels.prompts.token_table import TokenTable
from cvg_kernels.prompts.tokens import EncodedText
from cvg_kernels.scenes.captions import Caption, random_clip, random_things
from cvg_kernels.scenes.ranking import average_precision, best_iou
from cvg_kernels.scenes.world import Body, render, render_masks
from cvg_kernels.viz import Panel, panels_with_intervals

MOTIONS = ("still", "slow", "quick")
NOISE = (0.25, 0.5, 0.75, 0.9)  # shares of the 1000 timesteps
_GRID = 16  # cells a side that maps are compared on
_BATCH = 4


def _spread(cross: torch.Tensor, spatial: torch.Tensor) -> torch.Tensor:
    """Attention to the word, spread by attention within each frame: (S + I)/2 · X."""
    eye = torch.eye(spatial.shape[-1], dtype=spatial.dtype)
    return torch.einsum("bfij,bkfj->bkfi", (spatial + eye) / 2, cross.flatten(3)).view_as(cross)


def _by_flow(form: str, residual: str | None = "average") -> Callable:
    return lambda group, maps: flow_of(group, maps, form, 0.01, "tokens_first", residual, "auto")


#: What is compared: (a group of layers, their maps) → `[B, K, F, h, w]`.
KINDS: dict[str, Callable[[Group, dict[str, torch.Tensor]], torch.Tensor]] = {
    "cross-attention": lambda group, maps: maps[group.cross],
    "cross × spatial": lambda group, maps: _spread(maps[group.cross], maps[group.spatial]),
    "rollout": _by_flow("rollout"),
    "soft path flow": _by_flow("soft"),
    "hard path flow": _by_flow("hard"),
    "hard path flow, A + I": _by_flow("hard", "add"),
    "exact flow": _by_flow("exact"),
}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A true clip and what its nouns name."""

    caption: Caption
    bodies: tuple[Body, ...]

    def masks(self) -> torch.Tensor:
        """Cells that each object covers, bool `[K, F, 16, 16]`:
        by at least half as much as the cell it covers most.
        """
        cover = render_masks(self.bodies)
        cells = avg_pool2d(cover, cover.shape[-1] // _GRID)
        return cells >= 0.5 * cells.amax((2, 3), keepdim=True).clamp_min(1e-6)


def labelled_clips(motion: str, count: int, seed: int) -> list[Labelled]:
    """True clips of two things of different shapes that stand or move, and are mostly seen.

    Args:
        motion: one of `MOTIONS`.
        count: how many.
        seed: random seed of the draw.
    """
    rng = np.random.default_rng((seed, 6, MOTIONS.index(motion)))
    speed = {"still": None, "slow": "slowly", "quick": "quickly"}[motion]
    found = []
    while len(found) < count:
        things = random_things(rng, 2)
        if things[0].shape == things[1].shape:
            continue
        if speed is not None:
            ways = rng.choice(["left", "right", "up", "down"], size=2)
            things = tuple(
                dataclasses.replace(thing, direction=str(way), speed=speed)
                for thing, way in zip(things, ways, strict=True)
            )
        clip = random_clip(rng, Caption(things))
        stand = all(np.ptp(body.centres, axis=0).max() == 0 for body in clip)
        if (speed is None) == stand:
            found.append(Labelled(Caption(things), clip))
    return found


@torch.no_grad()
def attribution(
    pipe: Any, *, clips: int, seed: int, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Average precision and best intersection over union of every kind of map against true masks.

    Args:
        pipe: the scenes pipeline.
        clips: number of clips of each motion.
        seed: random seed of clips and noise.
        progress: called with the number of denoiser calls made, of `clips · len(MOTIONS) · len(NOISE)`.

    Returns:
        Motion → share of noise → kind → `average_precision` and `iou` with 95 % intervals, and `against_cross`, the
        paired difference of the average precision to bare cross-attention, clip by clip.
    """
    report: dict[str, Any] = {}
    done = 0
    for motion in MOTIONS:
        labelled = labelled_clips(motion, clips, seed)
        for share in NOISE:
            scores: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
            for start in range(0, clips, _BATCH):
                part = labelled[start : start + _BATCH]
                for kind, maps in noun_maps(pipe, part, share, seed * 1_000_003 + start).items():
                    scores[kind] += [_score(one, of) for one, of in zip(maps, part, strict=True)]
                done += len(part)
                progress(done)
            report.setdefault(motion, {})[f"{share:g}"] = _summed(scores)
    return report


def _score(maps: torch.Tensor, labelled: Labelled) -> tuple[float, float]:
    """Average precision and best IoU of a clip, mean over its nouns."""
    pairs = list(zip(maps, labelled.masks(), strict=True))
    precision = np.mean([average_precision(one, mask) for one, mask in pairs])
    return float(precision), float(np.mean([best_iou(one, mask) for one, mask in pairs]))


def _summed(scores: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    base = [precision for precision, _ in scores["cross-attention"]]
    return {
        kind: {
            "average_precision": mean([precision for precision, _ in each]),
            "iou": mean([iou for _, iou in each]),
            "against_cross": paired_difference(base, [precision for precision, _ in each]),
        }
        for kind, each in scores.items()
    }


def noun_maps(pipe: Any, labelled: Sequence[Labelled], noise: float, seed: int) -> dict[str, torch.Tensor]:
    """The maps of each clip's nouns in one denoiser call, `[B, K, F, 16, 16]` for every kind, mean over the layers.

    Args:
        pipe: the pipeline.
        labelled: the clips.
        noise: share of the timesteps.
        seed: random seed of the noise.
    """
    video = render([one.bodies for one in labelled]) * 2 - 1
    batch, frames = video.shape[:2]
    latents = pipe.vae.encode(video.flatten(0, 1)).latent_dist.mean * pipe.vae.config.scaling_factor
    latents = latents.unflatten(0, (batch, frames)).transpose(1, 2)
    drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    timesteps = torch.full((batch,), int(1000 * noise) - 1)
    noisy = pipe.scheduler.add_noise(latents, drawn, timesteps)
    captions = [str(one.caption) for one in labelled]
    tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = pipe.text_encoder(tokens)[0].repeat_interleave(frames, dim=0)
    spans = [
        EncodedText.of_prompt(pipe.tokenizer, caption).find([thing.shape for thing in one.caption.things])
        for caption, one in zip(captions, labelled, strict=True)
    ]
    table = TokenTable.of(spans)
    groups = flow_groups(pipe.unet, "soft", spatial=True)
    with LayerCapture(
        pipe.unet,
        table.ids,
        [group.cross for group in groups],
        [name for group in groups for name in group.temporal],
        [group.spatial for group in groups],
    ) as capture:
        maps = capture.run(lambda: pipe.unet(noisy, timesteps, encoder_hidden_states=text))
    found: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    for group in groups:
        plain = dataclasses.replace(group, spatial=None)
        for kind, make in KINDS.items():
            group_maps = make(group if "spatial" in kind else plain, maps)
            words = table.by_word(group_maps)
            grown = interpolate(words.flatten(0, 2)[:, None], (_GRID, _GRID), mode="bilinear")
            found[kind].append(grown[:, 0].unflatten(0, words.shape[:3]))
    return {kind: torch.stack(each).mean(0) for kind, each in found.items()}


def print_attribution(report: dict[str, Any]) -> None:
    """Prints the average precision of every kind, and what it is above cross-attention."""
    for motion, by_noise in report.items():
        print(f"{motion}: average precision in %, difference to cross-attention [95 % interval]")
        print("  ".join(["".ljust(22), *(f"noise {share}".ljust(26) for share in by_noise)]))
        for kind in KINDS:
            cells = []
            for by_kind in by_noise.values():
                found = by_kind[kind]
                cell = f"{found['average_precision']['mean']:5.1%}"
                if kind != "cross-attention":
                    low, high = found["against_cross"]["ci95"]
                    gap = found["against_cross"]["difference"]
                    cell += f" {100 * gap:+5.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
                cells.append(cell.ljust(26))
            print("  ".join([kind.ljust(22), *cells]))


def draw_attribution(report: dict[str, Any], path: Path) -> None:
    """Draws the average precision of every kind against the noise, a panel for each motion.

    Args:
        report: as `attribution` gives it.
        path: where the PNG goes.
    """
    row = [
        Panel(
            f"noise, objects {motion}",
            list(by_noise),
            {kind: [found[kind]["average_precision"] for found in by_noise.values()] for kind in KINDS},
        )
        for motion, by_noise in report.items()
    ]
    panels_with_intervals([row], path)
