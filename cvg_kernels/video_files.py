"""Reads the videos that people bring: GIF and other animations, MP4 and what else ffmpeg reads, folders of frames.

Only the frames that are asked for are kept, however long the video is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from cvg_kernels.errors import ArgumentError, is_whole

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
_ANIMATIONS = {".gif", ".webp", ".png", ".apng"}
#: Frames are taken at least this densely, unless asked otherwise: farther apart, a clip no longer shows motion.
_SPARSEST = 8

#: How many frames there are, and a function that gives chosen ones, in order, as PIL images or arrays.
_Source = tuple[int, Callable[[Sequence[int]], Iterator[Any]]]


@dataclass(frozen=True)
class VideoClip:
    """Frames of a video file.

    Attributes:
        frames: float32 `[F, 3, H, W]` in [0, 1].
        indices: numbers of the frames in the file, 0 first.
        total: how many the file has.
        notes: what was done to them, a sentence each.
    """

    frames: torch.Tensor
    indices: tuple[int, ...]
    total: int
    notes: tuple[str, ...]


def read_video(
    path: str | Path,
    frames: int = 8,
    *,
    start: int = 0,
    every: int | None = None,
    size: int | None = None,
) -> VideoClip:
    """Reads frames of a video.

    Args:
        path: a GIF or another animation, a video file, or a folder of images, which are taken in the order of their names,
            numbers by their value.
        frames: how many at most; fewer if the video ends before, but two at least.
        start: number of the first, 0 the video's first.
        every: take every n-th; `None` spreads them over the video, up to 8 apart.
        size: side of the square that frames are cut to, around their middle, and resized to; `None` leaves them alone.

    Raises:
        ArgumentError: if there is no such video, it cannot be read, or it has fewer than two frames from `start` on.
    """
    for name, value, least in (("frames", frames, 2), ("start", start, 0), ("every", every, 1)):
        if value is not None and not is_whole(value, least):
            raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    path = Path(path)
    total, read = _source(path)
    step = every or min(max(1, (total - start) // frames), _SPARSEST)
    wanted = range(start, total, step)[:frames]
    if len(wanted) < 2:
        how = f", every {_nth(step)} from frame {start} on" if start or every else ""
        raise ArgumentError(f"video must have at least two frames{how}, got {path} with {total}")
    notes: dict[str, None] = {}  # in order, each once
    if len(wanted) < total:
        which = (
            f"every {_nth(step)} from frame {start} on" if step > 1 else f"{start} to {wanted[-1]}"
        )
        notes[f"took {len(wanted)} of {total} frames: {which}"] = None
    pictures = _read(path, read, wanted, size, notes)
    if len(pictures) < 2:
        raise ArgumentError(
            f"video must have at least two frames that can be read, got {path} with {len(pictures)} of {total}"
        )
    if len(pictures) < len(wanted):
        notes[f"the file is cut off: {len(pictures)} frames could be read"] = None
    return VideoClip(torch.stack(pictures), tuple(wanted[: len(pictures)]), total, tuple(notes))


def read_image(path: str | Path) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Reads an image as float32 `[3, H, W]` in [0, 1], and what was done to it.

    Raises:
        ArgumentError: if it cannot be read.
    """
    from PIL import Image

    notes: dict[str, None] = {}
    try:
        with Image.open(path) as image:
            return _tensor(image, notes), tuple(notes)
    except Exception as error:
        raise ArgumentError(
            f"image must be a picture that can be read, got {path}: {_short(error)}"
        ) from None


def fit_square(frame: torch.Tensor, size: int) -> torch.Tensor:
    """Cuts the largest square out of the middle of a picture `[3, H, W]` and resizes it to `[3, size, size]`."""
    side = min(frame.shape[1:])
    top, left = ((whole - side) // 2 for whole in frame.shape[1:])
    square = frame[:, top : top + side, left : left + side]
    if side == size:
        return square
    # larger pictures are averaged; bicubic interpolation of smaller ones may leave the range
    found = interpolate(square[None], (size, size), mode="bicubic", antialias=side > size)
    return found[0].clamp(0, 1)


def _read(
    path: Path,
    read: Callable[[Sequence[int]], Iterator[Any]],
    wanted: Sequence[int],
    size: int | None,
    notes: dict[str, None],
) -> list[torch.Tensor]:
    pictures: list[torch.Tensor] = []
    first = None
    try:
        for picture in read(wanted):
            frame = _tensor(picture, notes)
            height, width = frame.shape[1:]
            first = first or (height, width)
            if (height, width) != first:
                raise ArgumentError(
                    f"video must have frames of one size, got {path} with {first[1]}×{first[0]} and {width}×{height}"
                )
            if size is not None and (height, width) != (size, size):
                cut = "" if height == width else "cut to the square in the middle and "
                notes[f"{cut}resized from {width}×{height} to {size}×{size}"] = None
                frame = fit_square(frame, size)
            pictures.append(frame)
    except ArgumentError:
        raise
    except Exception as error:  # decoders raise anything on a broken file
        if len(pictures) < 2:
            raise ArgumentError(
                f"video must be one that can be read, got {path}: {_short(error)}"
            ) from None
    return pictures


def _source(path: Path) -> _Source:
    """Finds out what a path is, by its contents where its name does not tell.

    Raises:
        ArgumentError: if there is nothing, or nothing that can be read.
    """
    if "://" in str(path) or re.match(r"\w+:/[^/]", str(path)):
        raise ArgumentError(f"video must be a file or a folder on this machine, got {path}")
    if not path.exists():
        raise ArgumentError(f"video must be a file or a folder that exists, got {path}")
    if path.is_dir():
        return _folder(path)
    if path.stat().st_size == 0:
        raise ArgumentError(f"video must be one that can be read, got {path}, which is empty")
    return _animation(path) if path.suffix.lower() in _ANIMATIONS else _film(path)


def _folder(path: Path) -> _Source:
    from PIL import Image

    def order(file: Path) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]

    files = sorted(
        (f for f in path.iterdir() if f.suffix.lower() in _IMAGES and f.is_file()), key=order
    )
    if not files:
        raise ArgumentError(
            f"video must be a folder with images ({', '.join(sorted(_IMAGES))}), got {path} without any"
        )

    def read(wanted: Sequence[int]) -> Iterator[Any]:
        for number in wanted:
            try:
                with Image.open(files[number]) as image:
                    image.load()
                    yield image
            except Exception as error:
                raise ArgumentError(
                    f"video must be a folder of images that can be read, got {files[number]}: {_short(error)}"
                ) from None

    return len(files), read


def _animation(path: Path) -> _Source:
    from PIL import Image

    try:
        with Image.open(path) as image:
            total = getattr(image, "n_frames", 1)
    except Exception as error:
        raise ArgumentError(
            f"video must be one that can be read, got {path}: {_short(error)}"
        ) from None

    def read(wanted: Sequence[int]) -> Iterator[Any]:
        with Image.open(path) as image:
            for number in wanted:
                image.seek(number)  # puts partial frames together
                yield image

    return total, read


def _film(path: Path) -> _Source:
    try:
        import imageio_ffmpeg as ffmpeg

        ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise ArgumentError(
            f'video must be a GIF or a folder of images without ffmpeg (pip install "cvg-kernels[video]"), got {path}'
        ) from None
    try:
        total = int(ffmpeg.count_frames_and_secs(str(path))[0])
    except Exception as error:
        raise ArgumentError(
            f"video must be one that ffmpeg can read, got {path}: {_short(error)}"
        ) from None

    def read(wanted: Sequence[int]) -> Iterator[Any]:
        stream = ffmpeg.read_frames(str(path), pix_fmt="rgb24")
        try:
            width, height = next(stream)["size"]
            chosen = set(wanted)
            for number, frame in enumerate(stream):
                if number in chosen:
                    yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)
                if number >= wanted[-1]:
                    return
        finally:
            stream.close()

    return total, read


def _tensor(picture: Any, notes: dict[str, None]) -> torch.Tensor:
    """A picture of any mode as float32 `[3, H, W]` in [0, 1]; what is transparent becomes black."""
    if isinstance(picture, np.ndarray):
        values = picture
    elif picture.mode.startswith(("I", "F")):  # 16 bits a pixel, or numbers of any range
        grey = np.asarray(picture).astype(np.float64)
        most = 65535.0 if picture.mode.startswith("I") else max(1.0, float(grey.max()))
        values = np.repeat((grey / most).clip(0, 1)[:, :, None], 3, 2) * 255
    else:
        if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
            rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32)
            if rgba[..., 3].min() < 255:
                notes["what is transparent is taken as black"] = None
            values = rgba[..., :3] * rgba[..., 3:] / 255
        else:
            values = np.asarray(picture.convert("RGB"))
    return torch.from_numpy(np.array(values, dtype=np.float32)).permute(2, 0, 1) / 255


def _nth(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(
        number % 10 if number % 100 not in (11, 12, 13) else 0, "th"
    )
    return f"{number}{ending}"


def _short(error: BaseException) -> str:
    """The last line of an error that says something, without the colours and the addresses of decoders."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else type(error).__name__
