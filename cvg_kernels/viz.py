"""Pictures: contact sheets, heat maps over frames, curves, and clips as GIF and MP4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from cvg_kernels.writing import written

_LABEL_HEIGHT = 22  # pixels above each row of a sheet
_MIN_TILE = 128  # pixels; smaller frames are enlarged


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """Frames `[F, 3, H, W]` in [0, 1] as `[F, H, W, 3]` bytes.

    Examples:
        >>> cvg.viz.to_uint8(torch.ones(1, 3, 2, 4)).shape
        (1, 2, 4, 3)
    """
    return (frames.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()


def _enlarge(frames: torch.Tensor) -> torch.Tensor:
    """Repeats pixels until a frame is large enough to look at."""
    factor = max(1, -(-_MIN_TILE // min(frames.shape[-2:])))
    return interpolate(frames.float(), scale_factor=factor, mode="nearest")


def overlay(frames: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Lays a heat map over frames, `[F, 3, H, W]` in [0, 1].

    Args:
        frames: `[F, 3, H, W]` in [0, 1].
        heat: `[f, h, w]`; scaled to its own range, resized bicubically, and, where the latents have fewer frames than
            the video, shown for the frames nearest to each.

    Examples:
        >>> cvg.viz.overlay(torch.rand(8, 3, 32, 32), torch.rand(8, 4, 4)).shape
        torch.Size([8, 3, 32, 32])
    """
    from matplotlib import colormaps

    heat = heat - heat.min()
    heat = heat / heat.max().clamp_min(1e-12)
    heat = heat[torch.linspace(0, len(heat) - 1, len(frames)).round().long()]
    heat = interpolate(heat[:, None], frames.shape[-2:], mode="bicubic", align_corners=False)
    heat = heat[:, 0].clamp(0, 1)
    colours = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).permute(0, 3, 1, 2)
    return 0.35 * frames + 0.65 * colours.float()


def contact_sheet(rows: Mapping[str, torch.Tensor]) -> Any:
    """Clips below each other, a labelled row each, as a PIL image.

    Args:
        rows: label → frames `[F, 3, H, W]` in [0, 1].

    Examples:
        >>> sheet = cvg.viz.contact_sheet({"before": torch.rand(4, 3, 32, 32), "after": torch.rand(4, 3, 32, 32)})
        >>> sheet.mode
        'RGB'
    """
    from PIL import Image, ImageDraw, ImageFont

    strips = [np.concatenate(list(to_uint8(_enlarge(frames))), axis=1) for frames in rows.values()]
    width = max(strip.shape[1] for strip in strips)
    height = sum(strip.shape[0] + _LABEL_HEIGHT for strip in strips)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    top = 0
    for label, strip in zip(rows, strips, strict=True):
        draw.text((4, top + 2), label, fill="black", font=font)
        sheet.paste(Image.fromarray(strip), (0, top + _LABEL_HEIGHT))
        top += _LABEL_HEIGHT + strip.shape[0]
    return sheet


def loss_curve(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the loss, and the scores of words where a method gives them, over the evaluations of a guided run.

    Args:
        history: `Run.history`.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([float(entry["loss"].mean()) for entry in history], "k-", label="loss")
    scores = [entry["scores"][0] if "scores" in entry else {} for entry in history]
    for word in dict.fromkeys(word for one in scores for word in one):
        values = [float(one.get(word, np.nan)) for one in scores]
        axes.plot(values, marker=".", label=f"score of {word!r}")
    steps = [entry["step"] for entry in history]
    first = [index for index, step in enumerate(steps) if index == 0 or step != steps[index - 1]]
    axes.set_xticks(first, [str(steps[index]) for index in first])
    axes.set_xlabel("denoising step")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save_figure(figure, path)


def save_png(picture: Any, path: Path) -> None:
    """Writes a picture, as `contact_sheet` makes them, as PNG."""
    with written(path) as new:
        picture.save(new)


def save_gif(frames: torch.Tensor, path: Path, fps: int = 6) -> None:
    """Writes frames `[F, 3, H, W]` in [0, 1] as a looping GIF."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in to_uint8(_enlarge(frames))]
    with written(path) as new:
        images[0].save(new, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def save_mp4(frames: torch.Tensor, path: Path, fps: int = 6) -> bool:
    """Writes frames `[F, 3, H, W]` in [0, 1] as MP4; returns `False` where no encoder is installed."""
    try:
        import imageio.v3 as imageio
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    with written(path) as new:
        imageio.imwrite(new, to_uint8(_enlarge(frames)), fps=fps, codec="libx264", macro_block_size=2)
    return True


def _save_figure(figure: Any, path: Path) -> None:
    with written(path) as new:
        figure.savefig(new, dpi=120)


def flow_graph(
    cross: torch.Tensor, hops: Sequence[torch.Tensor], near: torch.Tensor, path: Path, *, token: str, sink: int
) -> None:
    """Draws the flow graph of a token at one position, with its minimum cut in red.

    Columns are the token, the frames after no hop, one hop, …; the width of an edge is its capacity. An edge is cut
    where it leads from the token's side (filled nodes) to the other.

    Args:
        cross: `[F]`, capacities token → frame.
        hops: `[F, F]` each, row = attending frame, skip connections mixed in.
        near: bool `[hops + 1, F]`, the nodes on the token's side.
        path: where the PNG goes.
        token: its name.
        sink: the output frame that the flow goes to.
    """
    from matplotlib.figure import Figure

    frames, layers = cross.shape[0], len(hops) + 1
    figure = Figure(figsize=(2.6 * (layers + 1), 0.52 * frames + 0.8), layout="constrained")
    axes = figure.subplots()
    height = [(frames - 1) / 2, *range(frames - 1, -1, -1)]  # of the token, then of each frame
    largest = max(float(cross.max()), *(float(hop.max()) for hop in hops))

    def draw(x: float, tail: float, head: float, capacity: float, cut: bool) -> None:
        width = 6 * capacity / largest
        style = {"color": "crimson", "zorder": 2} if cut else {"color": "0.6", "zorder": 1}
        axes.plot([x, x + 1], [tail, head], linewidth=max(width, 0.15), solid_capstyle="butt", **style)

    for f in range(frames):
        draw(0, height[0], height[f + 1], float(cross[f]), not bool(near[0, f]))
    for h, hop in enumerate(hops):
        targets = [sink] if h + 1 == len(hops) else range(frames)
        for i in targets:
            for j in range(frames):
                cut = bool(near[h, j]) and not bool(near[h + 1, i])
                draw(h + 1, height[j + 1], height[i + 1], float(hop[i, j]), cut)
    axes.scatter([0], [height[0]], s=260, color="black", zorder=3)
    axes.annotate(token, (0, height[0]), (0, height[0] + 0.55), ha="center")
    for h in range(layers):
        for f in range(frames):
            if h + 1 == layers and f != sink:
                continue
            face = "black" if bool(near[h, f]) else "white"
            axes.scatter([h + 1], [height[f + 1]], s=90, color=face, edgecolor="black", zorder=3)
    axes.set_xticks(
        range(layers + 1), ["token", "cross-attention", *(f"temporal hop {h + 1}" for h in range(len(hops)))]
    )
    axes.set_yticks(height[1:], [f"frame {f}" for f in range(frames)])
    axes.spines[:].set_visible(False)
    _save_figure(figure, path)


@dataclass(frozen=True)
class Panel:
    """Rates or means with their 95 % intervals against a setting.

    Attributes:
        label: name of the setting that was varied.
        x: its values, numbers or names.
        curves: name → entries with `rate`, `mean` or `value`, and `ci95`, one for each value.
        stock: the value at which nothing is changed, marked by a line.
        top: end of the vertical axis, which begins at 0; `None` leaves it to the curves.
    """

    label: str
    x: Sequence[float] | Sequence[str]
    curves: Mapping[str, Sequence[Mapping[str, Any]]]
    stock: float | None = None
    top: float | None = 1.02


def curve_with_intervals(
    x: Sequence[float],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    *,
    label: str,
    stock: float | None = None,
) -> None:
    """Plots rates or means with their 95 % intervals against a setting;
    see `Panel`, and `path`, where the PNG goes.
    """
    panels_with_intervals([[Panel(label, x, curves, stock)]], path)


def panels_with_intervals(rows: Sequence[Sequence[Panel]], path: Path) -> None:
    """Plots rows of panels, those of a row with the same curves and one legend.

    Args:
        rows: rows of panels, equally many in each.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    size = (3.2 + 3.8 * len(rows[0]), 3.4 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    for places, panels in zip(figure.subplots(len(rows), len(rows[0]), squeeze=False), rows, strict=True):
        for axes, panel in zip(places, panels, strict=True):
            _draw_panel(axes, panel)
        places[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save_figure(figure, path)


_MIDDLES = ("rate", "mean", "value")


def _draw_panel(axes: Any, panel: Panel) -> None:
    for name, entries in panel.curves.items():
        middles = [next(entry[key] for key in _MIDDLES if key in entry) for entry in entries]
        (line,) = axes.plot(panel.x, middles, "o-", label=name)
        low, high = zip(*(entry["ci95"] for entry in entries), strict=True)
        axes.fill_between(panel.x, low, high, color=line.get_color(), alpha=0.15)
    if panel.stock is not None:
        axes.axvline(panel.stock, color="0.5", linestyle=":")
    axes.set_xlabel(panel.label)
    axes.set_ylim(0, panel.top)


def attention_maps(maps: Mapping[str, torch.Tensor], path: Path) -> None:
    """Temporal attention maps side by side, each to its own scale.

    Args:
        maps: label → `[F, F]`, row = attending frame.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.7 * len(maps), 3), layout="constrained")
    for axes, (label, one) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        axes.imshow(one.cpu().numpy(), cmap="viridis")
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("attended frame")
        axes.set_ylabel("attending frame")
    _save_figure(figure, path)
