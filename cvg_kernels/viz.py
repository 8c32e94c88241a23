"""Pictures: contact sheets, heat maps over frames, curves, and clips as GIF and MP4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

_LABEL_HEIGHT = 22  # pixels above each row of a sheet
_MIN_TILE = 128  # pixels; smaller frames are enlarged


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """Frames `[F, 3, H, W]` in [0, 1] as `[F, H, W, 3]` bytes."""
    return (
        (frames.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    )


def _enlarge(frames: torch.Tensor) -> torch.Tensor:
    """Repeats pixels until a frame is large enough to look at."""
    factor = max(1, -(-_MIN_TILE // min(frames.shape[-2:])))
    return interpolate(frames.float(), scale_factor=factor, mode="nearest")


def overlay(frames: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Lays a heat map over frames, `[F, 3, H, W]` in [0, 1].

    Args:
        frames: `[F, 3, H, W]` in [0, 1].
        heat: `[F, h, w]`; scaled to its own range and resized bicubically.
    """
    from matplotlib import colormaps

    heat = heat - heat.min()
    heat = heat / heat.max().clamp_min(1e-12)
    heat = interpolate(heat[:, None], frames.shape[-2:], mode="bicubic", align_corners=False)
    heat = heat[:, 0].clamp(0, 1)
    colours = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).permute(0, 3, 1, 2)
    return 0.35 * frames + 0.65 * colours.float()


def contact_sheet(rows: Mapping[str, torch.Tensor]) -> Any:
    """Clips below each other, a labelled row each, as a PIL image.

    Args:
        rows: label → frames `[F, 3, H, W]` in [0, 1].
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
    """Plots the loss, and the score that a method gives each word, over the evaluations of a guided run.

    Args:
        history: of a `Run`.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([float(entry["loss"].mean()) for entry in history], "k-", label="loss")
    scores = [entry["peaks"][0] for entry in history]
    for word in dict.fromkeys(word for one in scores for word in one):
        values = [float(one.get(word, np.nan)) for one in scores]
        axes.plot(values, marker=".", label=f"score of {word!r}")
    steps = [entry["step"] for entry in history]
    first = [at for at, step in enumerate(steps) if at == 0 or step != steps[at - 1]]
    axes.set_xticks(first, [str(steps[at]) for at in first])
    axes.set_xlabel("denoising step")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def save_gif(frames: torch.Tensor, path: Path, fps: int = 6) -> None:
    """Writes frames `[F, 3, H, W]` in [0, 1] as a looping GIF."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in to_uint8(_enlarge(frames))]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0
    )


def save_mp4(frames: torch.Tensor, path: Path, fps: int = 6) -> bool:
    """Writes frames `[F, 3, H, W]` in [0, 1] as MP4; returns `False` where no encoder is installed."""
    try:
        import imageio.v3 as imageio
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    imageio.imwrite(path, to_uint8(_enlarge(frames)), fps=fps, codec="libx264", macro_block_size=2)
    return True
