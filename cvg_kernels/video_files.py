"""Reads the videos that people bring: GIF and other animations, MP4 and what else ffmpeg reads, folders of frames.

Only the frames that are asked for are kept, however long the video is.
"""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cvg_kernels.errors import ArgumentError, is_whole, nearest
from cvg_kernels.image_files import fit_square, shortened, to_tensor, upright

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
_ANIMATIONS = {".gif", ".webp", ".png", ".apng"}
#: Frames are taken at least this densely, unless asked otherwise: farther apart, a clip no longer shows motion.
_SPARSEST = 8
_FITS = ("crop", "pad")

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
    fit: Literal["crop", "pad"] = "crop",
) -> VideoClip:
    """Reads frames of a video.

    Args:
        path: a GIF or another animation, a video file, or a folder of images, which are taken in the order of their
            names, numbers by their value.
        frames: how many at most; fewer if the video ends before, but two at least.
        start: number of the first, 0 the video's first.
        every: take every n-th; `None` spreads them over the video, up to 8 apart.
        size: side of the square that frames are brought to; `None` leaves them alone.
        fit: how: "crop" cuts the square in the middle, "pad" adds black on both sides.

    Raises:
        ArgumentError: if an argument does not fit, there is no such video, it cannot be read, or it has fewer than two
            frames from `start` on.
    """
    for name, value, least in (("frames", frames, 2), ("start", start, 0), ("every", every, 1)):
        if value is not None and not is_whole(value, least):
            raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if fit not in _FITS:
        raise ArgumentError(f"fit must be one of {', '.join(_FITS)}, got {fit!r}{nearest(fit, _FITS)}")
    path = _existing(path)
    total, read = _source(path)
    step = every or min(max(1, (total - start) // frames), _SPARSEST)
    wanted = _wanted(path, total, frames, start, step)
    notes: dict[str, None] = {}  # in order, each once
    if len(wanted) < total:
        which = f"every {_nth(step)} from frame {start} on" if step > 1 else f"{start} to {wanted[-1]}"
        notes[f"took {len(wanted)} of {total} frames: {which}"] = None
    pictures = _read(path, read, wanted, size, fit, notes)
    if len(pictures) < 2:
        raise ArgumentError(
            f"video must have at least two frames that can be read, got {path} with {len(pictures)} of {total}"
        )
    if len(pictures) < len(wanted):
        notes[f"the file is cut off: {len(pictures)} frames could be read"] = None
    elif _cut_off(path):
        notes[f"the file is cut off: {total} frames could be read"] = None
    return VideoClip(torch.stack(pictures), tuple(wanted[: len(pictures)]), total, tuple(notes))


def check_video(path: str | Path, start: int = 0, every: int | None = None) -> None:
    """Checks that a video is there, of a kind that is read, and has two frames, without decoding any.

    Args:
        path: as for `read_video`, like the others.
        start: number of the first frame.
        every: take every n-th.

    Raises:
        ArgumentError: if not.
    """
    path = _existing(path)
    _wanted(path, _source(path)[0], 2, start, every or 1)


def _wanted(path: Path, total: int, frames: int, start: int, step: int) -> range:
    """The numbers of the frames that are taken.

    Raises:
        ArgumentError: if they are fewer than two.
    """
    wanted = range(start, total, step)[:frames]
    if len(wanted) < 2:
        how = f", every {_nth(step)} from frame {start} on" if start or step > 1 else ""
        raise ArgumentError(f"video must have at least two frames{how}, got {path} with {total}")
    return wanted


def _read(
    path: Path,
    read: Callable[[Sequence[int]], Iterator[Any]],
    wanted: Sequence[int],
    size: int | None,
    fit: Literal["crop", "pad"],
    notes: dict[str, None],
) -> list[torch.Tensor]:
    pictures: list[torch.Tensor] = []
    first = None
    try:
        for picture in read(wanted):
            frame = to_tensor(picture, notes)
            height, width = frame.shape[1:]
            first = first or (height, width)
            if (height, width) != first:
                raise ArgumentError(
                    f"video must have frames of one size, got {path} with {first[1]}×{first[0]} and {width}×{height}"
                )
            if size is not None and (height, width) != (size, size):
                how = {"crop": "cut to the square in the middle", "pad": "padded to a square"}
                cut = "" if height == width else f"{how[fit]} and "
                notes[f"{cut}resized from {width}×{height} to {size}×{size}"] = None
                frame = fit_square(frame, size, fit)
            pictures.append(frame)
    except ArgumentError:
        raise
    except Exception as error:  # decoders raise anything on a broken file
        if len(pictures) < 2:
            raise ArgumentError(f"video must be one that can be read, got {path}: {shortened(error)}") from None
    return pictures


def _existing(path: str | Path) -> Path:
    """Checks that there is a file or a folder of that name, without reading it.

    Raises:
        ArgumentError: if there is none, it is empty, or it is an address.
    """
    text, path = str(path), Path(path)
    if not text.strip():
        raise ArgumentError(f"video must be a file or a folder, got {text!r}")
    if re.match(r"[A-Za-z][\w+.-]+:/", text):  # one letter is a drive
        raise ArgumentError(f"video must be a file or a folder on this machine, got {text}")
    try:
        if not path.exists():
            raise ArgumentError(f"video must be a file or a folder that exists, got {text!r}")
        if path.is_dir():
            next(path.iterdir(), None)
        elif not path.is_file():
            raise ArgumentError(f"video must be a file or a folder, got {text!r}")
        elif path.stat().st_size == 0:
            raise ArgumentError(f"video must be one that can be read, got {path}, which is empty")
    except ArgumentError:
        raise
    except (OSError, ValueError) as error:  # a name too long, no permission, a zero byte
        raise ArgumentError(
            f"video must be a file or a folder that can be read, got {text[:80]!r}: {shortened(error)}"
        ) from None
    return path


def _source(path: Path) -> _Source:
    """Finds out how a path is read."""
    if path.is_dir():
        return _folder(path)
    return _animation(path) if path.suffix.lower() in _ANIMATIONS else _film(path)


def _folder(path: Path) -> _Source:
    from PIL import Image

    def order(file: Path) -> list:
        parts = re.split(r"(\d+)", file.name)  # texts and numbers take turns
        return [int(part) if index % 2 else part for index, part in enumerate(parts)]

    files = sorted((file for file in path.iterdir() if _is_frame(file)), key=order)
    if not files:
        raise ArgumentError(
            f"video must be a folder with images ({', '.join(sorted(_IMAGES))}), got {path} without any"
        )

    def read(wanted: Sequence[int]) -> Iterator[Any]:
        for number in wanted:
            try:
                with Image.open(files[number]) as image:
                    picture = upright(image)
                    picture.load()
            except Exception as error:
                raise ArgumentError(
                    f"video must be a folder of images that can be read, got {files[number]}: {shortened(error)}"
                ) from None
            yield picture

    return len(files), read


def _is_frame(file: Path) -> bool:
    """Whether a file is an image, and none of the hidden ones that systems leave beside each."""
    hidden = file.name.startswith(".")
    return not hidden and file.suffix.lower() in _IMAGES and file.is_file()


def _animation(path: Path) -> _Source:
    from PIL import Image

    try:
        with Image.open(path) as image:
            total = _length(image)
    except Exception as error:
        raise ArgumentError(f"video must be one that can be read, got {path}: {shortened(error)}") from None

    def read(wanted: Sequence[int]) -> Iterator[Any]:
        with Image.open(path) as image:
            for number in wanted:
                image.seek(number)  # puts partial frames together
                yield image

    return total, read


def _cut_off(path: Path) -> bool:
    """Whether an animation ends before its format says it does; of films, ffmpeg tells that."""
    if path.is_dir() or path.suffix.lower() not in _ANIMATIONS:
        return False
    with path.open("rb") as file:
        head = file.read(12)
        length = file.seek(0, 2)
        file.seek(-min(length, 64), 2)
        tail = file.read()
    if head.startswith(b"GIF8"):
        return not tail.rstrip(b"\0").endswith(b";")
    if head.startswith(b"\x89PNG"):
        return b"IEND" not in tail
    return head.startswith(b"RIFF") and length < int.from_bytes(head[4:8], "little") + 8


def _length(image: Any) -> int:
    """The frames of an animation; of one that is cut off, those that are there."""
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # where a file is cut decides what is raised
        image.seek(0)
        try:
            while True:
                image.seek(image.tell() + 1)
        except Exception:
            return image.tell() + 1


def _film(path: Path) -> _Source:
    try:
        import imageio_ffmpeg as ffmpeg

        ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise ArgumentError(
            f'video must be a GIF or a folder of images without ffmpeg (pip install "cvg-kernels[video]"), got {path}'
        ) from None
    total = _count(ffmpeg.get_ffmpeg_exe(), path)

    def read(wanted: Sequence[int]) -> Iterator[Any]:
        # Every frame once, however long it is shown: else those that stand longer would be repeated.
        stream = ffmpeg.read_frames(
            f"file:{path}",
            pix_fmt="rgb24",
            input_params=_LOCAL,
            output_params=["-map", "0:v:0", "-fps_mode", "passthrough"],
        )
        try:
            with _quiet("imageio_ffmpeg"):  # it tells of every clip that is to be turned
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


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps what a library logs below errors from being shown."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


#: A playlist that goes by the name of a video must not make ffmpeg fetch anything.
_LOCAL = ["-protocol_whitelist", "file"]


def _count(ffmpeg: str, path: Path) -> int:
    """The frames of a film; they are not decoded.

    Raises:
        ArgumentError: if ffmpeg cannot read it.
    """
    command = [ffmpeg, "-nostdin", "-v", "error", *_LOCAL, "-i", f"file:{path}"]
    command += ["-map", "0:v:0", "-c", "copy", "-f", "null", "-progress", "pipe:1", "-"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    counts = re.findall(r"^frame=\s*(\d+)", done.stdout, re.MULTILINE)
    if not counts or not int(counts[-1]):
        # the first says what is wrong, the others what became of it
        lines = [line for line in done.stderr.splitlines() if "Error opening" not in line]
        reason = shortened("\n".join(lines[:1])) or "no frames"
        raise ArgumentError(f"video must be one that ffmpeg can read, got {path}: {reason}")
    return int(counts[-1])


def _nth(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0, "th")
    return f"{number}{ending}"
