"""Videos as people have them: the frames that were asked for, or one clear error."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
ffmpeg = pytest.importorskip("imageio_ffmpeg")

from PIL import Image  # noqa: E402

from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.image_files import fit_square, read_image  # noqa: E402
from cvg_kernels.video_files import read_video  # noqa: E402


def grey_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames of one grey each, so that a frame says which it is."""
    levels = np.arange(count) * (240 // count)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def numbers(clip, count: int) -> list[int]:
    """Which frames of `grey_frames` a clip has; the nearest, since codecs round."""
    return [round(float(frame.mean()) * 255 / (240 // count)) for frame in clip.frames]


def write_film(path, frames: np.ndarray, *options: str) -> None:
    """Encodes frames with ffmpeg."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    command = [ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", size, "-r", "10", "-i", "-", *options, str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)


def convert(source, path, *options: str, before: tuple[str, ...] = ()) -> None:
    """Makes a film of another."""
    command = [ffmpeg.get_ffmpeg_exe(), "-v", "error", *before, "-i", str(source), *options]
    subprocess.run([*command, str(path)], check=True)


def save_animation(path, frames, **options) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], **options)


def write_folder(path, frames, name: str = "frame{}.png") -> None:
    path.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(path / name.format(number))


def refused(path, *parts: str, **options) -> str:
    with pytest.raises(ArgumentError) as error:
        read_video(path, **options)
    message = str(error.value)
    assert message.startswith("video must") and "\n" not in message
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm", "avi", "gif", "webp", "png", "folder"])
def test_every_kind_gives_the_frames_asked_for(ending, tmp_path):
    path, frames = tmp_path / f"clip.{ending}", grey_frames(30)
    if ending == "folder":
        write_folder(path, frames)  # frame10 comes after frame9
    elif ending in ("gif", "webp", "png"):
        save_animation(path, frames, **({"lossless": True} if ending == "webp" else {}))
    else:
        write_film(path, frames)
    clip = read_video(path, 8)
    assert clip.frames.shape == (8, 3, 48, 64) and clip.frames.dtype == torch.float32
    assert clip.total == 30 and clip.indices == tuple(range(0, 24, 3))
    assert numbers(clip, 30) == list(clip.indices)
    assert clip.notes == ("took 8 of 30 frames: every 3rd from frame 0 on",)
    chosen = read_video(path, 4, start=20, every=2)
    assert numbers(chosen, 30) == [20, 22, 24, 26] == list(chosen.indices)


def test_a_clip_of_the_right_length_is_left_alone(tmp_path):
    save_animation(tmp_path / "clip.gif", grey_frames(8, 64, 64))
    clip = read_video(tmp_path / "clip.gif", 8, size=64)
    assert clip.notes == () and clip.indices == tuple(range(8))


def test_a_film_of_varying_frame_rate_gives_each_frame_once(tmp_path):
    write_film(tmp_path / "even.mp4", grey_frames(20))
    slower = "setpts='if(lt(N,10),N,10+(N-10)*8)/10/TB'"
    convert(tmp_path / "even.mp4", tmp_path / "uneven.mp4", "-vf", slower, "-fps_mode", "vfr")
    clip = read_video(tmp_path / "uneven.mp4", 10)
    assert clip.total == 20 and numbers(clip, 20) == list(range(0, 20, 2))


def test_a_turned_film_is_upright(tmp_path, caplog):
    write_film(tmp_path / "lying.mp4", grey_frames(10, 48, 64))
    turn = ("-display_rotation", "90")
    convert(tmp_path / "lying.mp4", tmp_path / "phone.mp4", "-c", "copy", before=turn)
    assert read_video(tmp_path / "phone.mp4").frames.shape == (8, 3, 64, 48)
    assert not caplog.records


def test_odd_sizes(tmp_path):
    write_film(tmp_path / "odd.mkv", grey_frames(8, 47, 61), "-c:v", "ffv1")
    clip = read_video(tmp_path / "odd.mkv")
    assert clip.frames.shape == (8, 3, 47, 61) and numbers(clip, 8) == list(range(8))


@pytest.mark.drawn(8, of="long tests")
def test_a_long_film_is_not_held(tmp_path, monkeypatch):
    """10 000 frames: those that are not asked for never become pictures."""
    write_film(tmp_path / "long.mp4", np.zeros((10_000, 32, 32, 3), np.uint8), "-preset", "ultrafast")
    made = []
    decode = np.frombuffer
    monkeypatch.setattr(np, "frombuffer", lambda *given: made.append(1) or decode(*given))
    clip = read_video(tmp_path / "long.mp4", 8, size=64)
    assert clip.total == 10_000 and len(made) == 8
    assert clip.indices == tuple(range(0, 64, 8))  # no farther apart, or motion is lost


@pytest.mark.drawn(8, of="long tests")
def test_a_long_folder_is_not_read(tmp_path):
    """Files that are not asked for are not opened: here they are no images at all."""
    write_folder(tmp_path / "frames", grey_frames(8))
    for number in range(8, 10_000):
        (tmp_path / "frames" / f"frame{number}.png").touch()
    assert read_video(tmp_path / "frames", every=1).total == 10_000


@pytest.mark.parametrize("height, width", [(96, 48), (48, 96)], ids=["portrait", "landscape"])
def test_squares(height, width, tmp_path):
    rng = np.random.default_rng()
    frames = rng.integers(0, 256, (8, height, width, 3), dtype=np.uint8)
    write_folder(tmp_path / "frames", frames)
    cropped = read_video(tmp_path / "frames", size=48)
    assert cropped.notes == (f"cut to the square in the middle and resized from {width}×{height} to 48×48",)
    middle = frames[:, 24:72] if height > width else frames[:, :, 24:72]
    expected = torch.from_numpy(middle.copy()).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(cropped.frames, expected)
    padded = read_video(tmp_path / "frames", size=96, fit="pad")
    assert padded.notes[0].startswith("padded to a square")
    whole = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    bars, inside = padded.frames, padded.frames
    if height > width:
        bars, inside = torch.cat([bars[..., :24], bars[..., 72:]], -1), inside[..., 24:72]
    else:
        bars, inside = torch.cat([bars[..., :24, :], bars[..., 72:, :]], -2), inside[..., 24:72, :]
    assert torch.equal(inside, whole) and not bars.any()


def test_resizing_keeps_the_mean_and_the_range():
    picture = (torch.rand(3, 200, 200) > 0.5).float()
    small, large = fit_square(picture, 64), fit_square(picture[:, :16, :16], 64)
    for made in (small, large):
        assert made.shape == (3, 64, 64) and made.min() >= 0 and made.max() <= 1
    assert abs(float(small.mean() - picture.mean())) < 0.05 and small.std() < 0.6 * picture.std()


def test_what_is_transparent_is_black(tmp_path):
    rng = np.random.default_rng()
    frames = rng.integers(0, 256, (3, 16, 16, 4), dtype=np.uint8)
    write_folder(tmp_path / "frames", frames)
    clip = read_video(tmp_path / "frames")
    assert clip.notes == ("what is transparent is taken as black",)
    values = torch.from_numpy(frames.astype(np.float64)).permute(0, 3, 1, 2) / 255
    expected = (values[:, :3] * values[:, 3:]).float()
    torch.testing.assert_close(clip.frames, expected, rtol=0, atol=1e-6)


def test_an_opaque_alpha_channel_is_no_matter(tmp_path):
    frames = np.full((3, 16, 16, 4), 255, np.uint8)
    write_folder(tmp_path / "frames", frames)
    assert read_video(tmp_path / "frames").notes == ()


def test_grey_palette_and_16_bit_images(tmp_path):
    rng = np.random.default_rng()
    deep = rng.integers(0, 2**16, (16, 16)).astype(np.uint16)
    flat = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    colours = Image.fromarray(np.stack([flat // 64 * 64] * 3, -1)).quantize(8)
    kinds = {"deep": Image.fromarray(deep), "grey": Image.fromarray(flat), "palette": colours}
    for name, image in kinds.items():
        folder = tmp_path / name
        folder.mkdir()
        for number in range(2):
            image.save(folder / f"{number}.png")
        clip = read_video(folder)
        values = {"deep": deep / 65535, "grey": flat / 255}.get(name)
        if values is None:
            values = np.asarray(colours.convert("L")) / 255
        expected = torch.from_numpy(values).float().expand(2, 3, 16, 16)
        torch.testing.assert_close(clip.frames, expected, rtol=0, atol=1e-6)


def test_partial_frames_of_a_gif_are_put_together(tmp_path):
    """Each frame stores only what has changed: a square that moves, and goes from where it was."""
    frames = np.zeros((6, 32, 32, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:] = (40, 60, 80)
        frame[4 * number : 4 * number + 8, 8:16] = (220, 20, 20)
    save_animation(tmp_path / "clip.gif", frames, optimize=True)
    with Image.open(tmp_path / "clip.gif") as image:
        image.seek(1)
        assert image.dispose_extent != (0, 0, 32, 32)  # it is stored in part
    clip = read_video(tmp_path / "clip.gif")
    torch.testing.assert_close(clip.frames, torch.from_numpy(frames).permute(0, 3, 1, 2) / 255, rtol=0, atol=1e-6)


def test_other_files_of_a_folder_are_passed_over(tmp_path):
    write_folder(tmp_path / "frames", grey_frames(3), "a ²{}.jpg")
    for name in ("Thumbs.db", "._frame0.png", "notes.txt"):
        (tmp_path / "frames" / name).write_bytes(b"x")
    (tmp_path / "frames" / "more.png").mkdir()
    assert read_video(tmp_path / "frames").total == 3


@pytest.mark.parametrize("name", ["a:b %d.mp4", "-i.mp4", "with 'quotes' é.mp4"])
def test_names_that_ffmpeg_reads_otherwise(name, tmp_path, monkeypatch):
    write_film(tmp_path / "clip.mp4", grey_frames(8))
    os.rename(tmp_path / "clip.mp4", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert numbers(read_video(name), 8) == list(range(8))


def test_bad_paths(tmp_path):
    refused(tmp_path / "missing.mp4", "exists", "missing.mp4")
    refused("https://example.org/clip.mp4", "on this machine")
    refused("file:/tmp/clip.mp4", "on this machine")
    refused(str(tmp_path / ("x" * 300)), "can be read")
    (tmp_path / "frames").mkdir()
    refused(tmp_path / "frames", "without any")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "empty")
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "pipe.mp4", "a file or a folder")


@pytest.mark.parametrize("ending", ["mp4", "gif", "webp", "png", "avi"])
def test_text_by_the_name_of_a_video(ending, tmp_path):
    path = tmp_path / f"clip.{ending}"
    path.write_text("this is no video\n" * 50)
    refused(path, "can", str(path))


def test_a_film_cut_off(tmp_path):
    """Without its index, at the end, an MP4 cannot be read; with the index in front, as much as is there."""
    frames = np.random.default_rng().integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    write_film(tmp_path / "whole.mp4", frames, "-g", "1")
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.mp4", "moov atom not found")
    convert(tmp_path / "whole.mp4", tmp_path / "web.mp4", "-c", "copy", "-movflags", "+faststart")
    web = (tmp_path / "web.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(web[: len(web) // 2])
    clip = read_video(tmp_path / "cut.mp4", 24, every=1)
    assert 2 <= len(clip.frames) < 24 and clip.notes
    assert torch.equal(clip.frames[:2], read_video(tmp_path / "web.mp4", 2, every=1).frames)


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_an_animation_cut_off(ending, tmp_path):
    """Wherever it is cut, the frames that are there are read and the cut is told, or it is refused."""
    rng = np.random.default_rng()
    frames = rng.integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    save_animation(tmp_path / f"whole.{ending}", frames)
    whole = (tmp_path / f"whole.{ending}").read_bytes()
    assert not any("cut off" in note for note in read_video(tmp_path / f"whole.{ending}").notes)
    cut_file = tmp_path / f"cut.{ending}"
    for cut in rng.integers(len(whole) // 3, len(whole) * 9 // 10, size=12):
        cut_file.write_bytes(whole[:cut])
        if ending == "webp":
            try:
                clip = read_video(cut_file, 10, every=1)
            except ArgumentError as error:
                assert str(cut_file) in str(error)
                continue
        else:
            clip = read_video(cut_file, 10, every=1)
            assert 2 <= len(clip.frames) < 10, cut
        assert f"the file is cut off: {len(clip.frames)} frames could be read" in clip.notes, cut
        there = read_video(tmp_path / f"whole.{ending}", len(clip.frames), every=1)
        assert torch.equal(clip.frames, there.frames), cut


@pytest.mark.parametrize("name", ["", " "])
def test_no_name(name):
    refused(name, "must be a file or a folder, got")


def test_sound_alone(tmp_path):
    path = tmp_path / "sound.mp4"
    convert("sine=d=1", path, before=("-f", "lavfi"))
    refused(path, "matches no streams")


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "mp4"])
def test_one_frame_is_no_video(ending, tmp_path):
    path = tmp_path / f"one.{ending}"
    if ending == "mp4":
        write_film(path, grey_frames(1))
    else:
        Image.fromarray(grey_frames(1)[0]).save(path)
    refused(path, "at least two frames", "with 1")


def test_too_few_frames_from_the_start_on(tmp_path):
    save_animation(tmp_path / "clip.gif", grey_frames(6))
    refused(tmp_path / "clip.gif", "from frame 5 on", start=5)
    refused(tmp_path / "clip.gif", "every 6th", every=6)
    assert len(read_video(tmp_path / "clip.gif", start=4).frames) == 2


def test_frames_of_several_sizes(tmp_path):
    write_folder(tmp_path / "frames", grey_frames(3))
    Image.new("RGB", (20, 30)).save(tmp_path / "frames" / "frame1.png")
    refused(tmp_path / "frames", "one size", "64×48", "20×30", size=64)


def test_a_broken_image_in_a_folder_is_named(tmp_path):
    write_folder(tmp_path / "frames", grey_frames(4))
    (tmp_path / "frames" / "frame2.png").write_bytes(b"\x89PNG broken")
    refused(tmp_path / "frames", "frame2.png")


@pytest.mark.parametrize("options", [{"frames": 1}, {"frames": 2.5}, {"start": -1}, {"every": 0}, {"fit": "stretch"}])
def test_bad_arguments(options, tmp_path):
    save_animation(tmp_path / "clip.gif", grey_frames(6))
    with pytest.raises(ArgumentError, match=next(iter(options))):
        read_video(tmp_path / "clip.gif", **options)


def test_images(tmp_path):
    rng = np.random.default_rng()
    pixels = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    image, notes = read_image(tmp_path / "image.png")
    assert image.shape == (3, 20, 30) and notes == ("what is transparent is taken as black",)
    turned = Image.fromarray(pixels[..., :3])
    exif = turned.getexif()
    exif[0x0112] = 6  # held upright
    turned.save(tmp_path / "phone.png", exif=exif)
    upright = np.rot90(pixels[..., :3], -1).copy()
    expected = torch.from_numpy(upright).permute(2, 0, 1) / 255
    assert torch.equal(read_image(tmp_path / "phone.png")[0], expected)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ArgumentError, match="image must be a picture that can be read, got .*text"):
        read_image(tmp_path / "text.png")
    for name in (tmp_path / "missing.png", tmp_path, ""):
        with pytest.raises(ArgumentError, match="image must be a file that exists, got '"):
            read_image(name)
    save_animation(tmp_path / "many.gif", grey_frames(3))
    image, notes = read_image(tmp_path / "many.gif")
    assert notes == ("the first frame of the animation is taken",)
    assert torch.equal(image, read_video(tmp_path / "many.gif", 2).frames[0])
