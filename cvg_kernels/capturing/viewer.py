"""One page to look at captured maps in a browser: clips side by side, and under the mouse the words ranked.

The page holds everything, pictures and maps, and loads nothing from anywhere. What would make it large is thinned out,
and the page says so.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from cvg_kernels.capturing.records import Record
from cvg_kernels.errors import ArgumentError
from cvg_kernels.writing import write_text

if TYPE_CHECKING:
    from cvg_kernels.capturing.capture import Capture

#: What pipelines give under `frames[0]`: `output_type="pt"`, `"np"` and `"pil"`.
Frames = torch.Tensor | np.ndarray | Sequence[Any]
_PAGE = Path(__file__).with_name("viewer.html")
_MOST_BYTES = 6 * 2**20  # of all maps of a page
ALL_STEPS, ALL_LAYERS = "all, mean", "all, mean"
#: How much of the maps is kept, from all of it on: steps at most, each layer by itself, cells a side at most.
_DETAIL: tuple[tuple[int | None, bool, int | None], ...] = (
    (None, True, None),
    (8, True, None),
    (8, False, None),
    (4, False, 32),
    (1, False, 16),
)


def write_viewer(
    path: str | Path, clips: Mapping[str, tuple[Frames, Capture]], *, prompt: str = "", fps: int = 6
) -> Path:
    """Writes a page that plays clips in step and shows where their words looked.

    In the browser: choose a word to lay its maps over the frames, a step and a layer; move the mouse over a clip to
    rank the words there.

    Args:
        path: path of the page, in a folder that exists.
        clips: name → frames as a pipeline gives them, and what was captured while they were made, of its last run and
            its first sample. Frames are a tensor `[F, 3, H, W]` or an array `[F, H, W, 3]`, both in [0, 1], or PIL
            images. One page takes several, such as with guidance and without.
        prompt: shown above.
        fps: frames a second.

    Returns:
        The path.

    Raises:
        ArgumentError: if there is no clip, frames are of another shape, or nothing was captured of words.
    """
    if not clips:
        raise ArgumentError("clips must hold at least one clip, got none")
    shown = {name: _as_tensor(frames, name) for name, (frames, _) in clips.items()}
    kept = {name: _records(captured.records, name) for name, (_, captured) in clips.items()}
    for most_steps, each_layer, side in _DETAIL:
        groups = {name: _groups(records, most_steps, each_layer, side) for name, records in kept.items()}
        size = sum(maps.size for each in groups.values() for *_, maps in each)
        if size <= _MOST_BYTES:
            break
    page = {
        "prompt": prompt,
        "fps": fps,
        "note": _note(most_steps, each_layer, side),
        "clips": [_clip(name, shown[name], kept[name][0].words, each) for name, each in groups.items()],
    }
    # "</" would end the script that holds it
    text = json.dumps(page, ensure_ascii=False).replace("</", "<\\/")
    write_text(Path(path), _PAGE.read_text(encoding="utf-8").replace("@@DATA@@", text))
    return Path(path)


def _as_tensor(frames: Frames, name: str) -> torch.Tensor:
    """Frames as a pipeline gives them, as `[F, 3, H, W]`.

    Raises:
        ArgumentError: for anything else.
    """
    found: Any = frames
    if isinstance(found, (list, tuple)) and found and all(hasattr(one, "convert") for one in found):  # PIL
        found = np.stack([np.asarray(one.convert("RGB"), dtype=np.float32) / 255 for one in found])
    if isinstance(found, np.ndarray) and found.ndim == 4:
        found = torch.from_numpy(found).movedim(3, 1)
    if not torch.is_tensor(found) or found.ndim != 4 or found.shape[1] != 3:
        shape = getattr(found, "shape", None)
        given = type(found).__name__ if shape is None else tuple(shape)
        raise ArgumentError(
            f"clips[{name!r}] must have the frames of one video: a tensor [F, 3, H, W], an array [F, H, W, 3] or PIL "
            f"images, got {given}"
        )
    return found


def _records(records: Sequence[Record], name: str) -> list[Record]:
    """The records of words in the last run, of the prompt's branch and the last section.

    Raises:
        ArgumentError: if there are none.
    """
    cross = [one for one in records if one.kind == "cross" and one.branch == "cond"]
    if not cross:
        raise ArgumentError(f"clips[{name!r}] must have captured maps of words, got none")
    last = max((one.run, one.section) for one in cross)
    return [one for one in cross if (one.run, one.section) == last]


def _groups(
    records: Sequence[Record], most_steps: int | None, each_layer: bool, side: int | None
) -> list[tuple[str, str, float, np.ndarray]]:
    """What the page can choose from: step, layer, largest share, and maps `[K, F, h, w]` as bytes of it."""
    calls: dict[tuple[int, str], list[torch.Tensor]] = {}
    for record in records:
        maps = record.maps[0].detach().float().cpu()
        maps = maps.mean(0) if maps.ndim == 5 else maps  # per head
        calls.setdefault((record.step, record.layer), []).append(_pooled(maps, side))
    layers = list(dict.fromkeys(layer for _, layer in calls))
    steps = sorted({step for step, _ in calls})
    shown = steps
    if most_steps is not None and len(steps) > most_steps:
        shown = [steps[index] for index in np.linspace(0, len(steps) - 1, most_steps).round().astype(int)]
    maps_of = {key: torch.stack(each).mean(0) for key, each in calls.items()}
    frames = max(maps.shape[1] for maps in maps_of.values())
    grid = max((maps.shape[-2:] for maps in maps_of.values()), key=lambda one: one[0] * one[1])
    for step in steps:
        maps_of_step = [maps_of[step, layer] for layer in layers if (step, layer) in maps_of]
        alike = [_resized(maps, frames, grid) for maps in maps_of_step]
        maps_of[step, ALL_LAYERS] = torch.stack(alike).mean(0)
    found = []  # what is first is chosen first: the mean of everything
    for layer in [ALL_LAYERS, *(layers if each_layer else [])]:
        by_step = {step: maps_of[step, layer] for step in steps if (step, layer) in maps_of}
        mean = torch.stack(list(by_step.values())).mean(0)
        found.append((ALL_STEPS, layer, *_as_bytes(mean)))
        found += [(str(step), layer, *_as_bytes(by_step[step])) for step in shown if step in by_step]
    return found


def _pooled(maps: torch.Tensor, side: int | None) -> torch.Tensor:
    """Maps `[K, F, h, w]` of so many cells a side at most."""
    largest = max(maps.shape[-2:])
    if side is None or largest <= side:
        return maps
    rows, columns = (max(1, round(n * side / largest)) for n in maps.shape[-2:])
    return adaptive_avg_pool2d(maps, (rows, columns))


def _resized(maps: torch.Tensor, frames: int, grid: Sequence[int]) -> torch.Tensor:
    """Maps `[K, f, h, w]` of a layer on the grid of the largest: the nearest frames, and between cells."""
    nearest = torch.linspace(0, maps.shape[1] - 1, frames).round().long()
    return interpolate(maps[:, nearest], tuple(grid), mode="bilinear", align_corners=False)


def _as_bytes(maps: torch.Tensor) -> tuple[float, np.ndarray]:
    scale = float(maps.max().clamp_min(1e-12))
    return scale, (maps.clamp_min(0) / scale * 255).round().byte().numpy()


def _clip(name: str, frames: torch.Tensor, words: Sequence[str], groups: Any) -> dict[str, Any]:
    """A clip as the page reads it: its frames below each other as one picture, its maps one after the other."""
    from PIL import Image

    rows = (frames.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1)
    picture = io.BytesIO()
    Image.fromarray(rows.flatten(0, 1).numpy()).save(picture, "PNG", optimize=True)
    entries, parts, offset = [], [], 0
    for step, layer, scale, maps in groups:
        grid = list(maps.shape[1:])
        entries.append({"step": step, "layer": layer, "scale": scale, "grid": grid, "offset": offset})
        parts.append(maps.tobytes())
        offset += maps.size
    return {
        "name": name,
        "frames": frames.shape[0],
        "height": frames.shape[2],
        "width": frames.shape[3],
        "words": list(words),
        "pictures": "data:image/png;base64," + _text(picture.getvalue()),
        "groups": entries,
        "maps": _text(b"".join(parts)),
    }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _note(most_steps: int | None, each_layer: bool, side: int | None) -> str:
    """What the page does not show, for those who look for it."""
    left_out = []
    if most_steps is not None:
        left_out.append(f"{most_steps} steps at most are shown by themselves")
    if not each_layer:
        left_out.append("the mean of the layers alone")
    if side is not None:
        left_out.append(f"maps of {side} cells a side at most")
    told = f" To keep the page small: {', '.join(left_out)}." if left_out else ""
    return f"Shares of attention that go to each word, mean over the heads.{told}"
