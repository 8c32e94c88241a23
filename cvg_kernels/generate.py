"""The main job: one prompt, a clip without and a clip with guidance, and a report of what changed."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from cvg_kernels import viz
from cvg_kernels.capturing import capture
from cvg_kernels.capturing.viewer import write_viewer
from cvg_kernels.environment import devices, versions
from cvg_kernels.errors import ArgumentError, nearest
from cvg_kernels.guidance.methods import method_named
from cvg_kernels.guidance.synopsis import split_at_then
from cvg_kernels.model_folders import check_pipeline, options_for, reason_of
from cvg_kernels.pipeline.session import Run
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.tokens import EncodedText, Word
from cvg_kernels.prompts.words import content_words
from cvg_kernels.writing import WritingError, write_text, written

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Job:
    """What `cvg-kernels generate` is asked to do. Sizes of `None` are the pipeline's own."""

    prompt: str
    output: Path
    guidance: str | None = None  #: `None`: cvg, for the shapes pipeline
    words: list[str] = field(default_factory=list)  #: empty: the prompt's content words
    model: str | None = None  #: a folder or hub id; `None`: the shapes pipeline
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 3.0
    frames: int = 8
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    dtype: str = "float32"
    device: str = "cpu"

    @cached_property
    def method(self) -> Any:
        """The guidance method, made once.

        Raises:
            ArgumentError: for one that does not fit, or none where the model has no classifier for `cvg`.
        """
        if self.guidance is None and self.model is not None:
            raise ArgumentError(
                "--guidance must be given with --model: cvg:classifier=FOLDER with a classifier of that model "
                "(cvg-kernels cvg train), or without training vico, vstar, gen1, temporal-band or flowmo"
            )
        method = method_named("cvg" if self.guidance is None else self.guidance, self.words or None)
        if method is None:
            raise ArgumentError("--guidance must be a method, got 'none'")
        return method

    @cached_property
    def shown_words(self) -> list[Word]:
        """The words whose heat maps are shown:
        those given, or what the prompt is about, as far as that can be told.
        """
        if self.words:
            return list(self.words)
        try:
            return content_words(self.prompt)
        except ArgumentError:  # a prompt of function words, or in a script without spaces
            return []

    def check(self) -> None:
        """Checks everything that can be checked before a model is loaded.

        Raises:
            ArgumentError: for what does not fit.
        """
        if not self.prompt.strip():
            raise ArgumentError("prompt must not be empty")
        for name in ("steps", "frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"--{name} must be at least 1, got {value}")
        check_seed(self.seed)
        if not math.isfinite(self.guidance_scale):
            raise ArgumentError(f"--guidance-scale must be finite, got {self.guidance_scale}")
        check_dtype(self.dtype)
        self.method  # noqa: B018 — made here, so that a wrong one is told before a model is loaded
        check_device(self.device)
        check_output(self.output)
        if self.model is None:
            from cvg_kernels.shapes.world import SIZE, parse_caption

            if {self.height, self.width} - {None, SIZE}:
                raise ArgumentError(
                    f"--height and --width must be {SIZE} with the shapes pipeline, got {self.height}×{self.width}"
                )
            try:
                for state in split_at_then(self.prompt) or [self.prompt]:
                    parse_caption(state)
            except ValueError as error:
                raise ArgumentError(
                    f"prompt does not fit the shapes pipeline (give another with --model): {error}"
                ) from None


def check_seed(seed: int) -> None:
    """Checks that torch takes a seed.

    Raises:
        ArgumentError: if not.
    """
    if not -(2**63) <= seed < 2**64:
        raise ArgumentError(f"--seed must fit 64 bits, got {seed}")


def check_dtype(dtype: str) -> None:
    """Checks that a pipeline can compute in a dtype.

    Raises:
        ArgumentError: if not.
    """
    if dtype not in _DTYPES:
        raise ArgumentError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}{nearest(dtype, _DTYPES)}")


def check_device(device: str) -> None:
    """Checks that a device can be used.

    Raises:
        ArgumentError: if not.
    """
    try:
        torch.ones(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"--device {device!r} cannot be used: {reason}") from None


def check_output(output: Path) -> None:
    """Checks that a folder can be filled, before anything is made that goes into it.

    Raises:
        ArgumentError: if not.
    """
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"--output must be a folder, got the file {output}")
    if not output.resolve().parent.is_dir():
        raise ArgumentError(f"--output must lie in a folder that exists, got {output}")
    try:
        tempfile.TemporaryDirectory(prefix=".cvg-", dir=output.resolve().parent).cleanup()
    except OSError as error:
        raise ArgumentError(f"--output cannot be written: {error}") from None


def run(
    job: Job, load: Callable[[Job], Any] | None = None, *, scratch: Path | None = None, bars: bool = True
) -> dict[str, Any]:
    """Does the job and returns the report; the output folder is filled at the end, or not at all.

    Args:
        job: what is asked for.
        load: gives the job's pipeline, on its device and in its dtype; `None` loads it anew.
        scratch: an existing folder, on the disk of the output, for what is being made; `None` takes the output's
            parent.
        bars: whether the steps are shown as they pass, where standard error is a terminal.

    Raises:
        ArgumentError: for what does not fit; nothing is written then.
    """
    job.check()
    times: dict[str, float] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of the job before
    with timed(times, "load"):
        pipe = (load or load_pipeline)(job)
    most = getattr(getattr(pipe, "unet", None), "config", {}).get("motion_max_seq_length")
    if most is not None and job.frames > most:
        raise ArgumentError(f"--frames must be at most {most} with this model, got {job.frames}")
    words = job.shown_words
    # A word that is not there is told before anything runs.
    EncodedText.of_prompt(pipe.tokenizer, job.prompt).find(words)

    clips, maps = {}, {}
    for name, attached in (("unguided", nullcontext()), ("guided", job.method.attach(pipe))):
        shown = bars and sys.stderr.isatty()
        pipe.set_progress_bar_config(desc=name, disable=not shown, leave=False)
        watched = capture(pipe, words=words) if words else nullcontext()
        with timed(times, name), attached as guided_run, watched as captured:
            clips[name] = _call(pipe, job)
            if not bool(clips[name].isfinite().all()):
                raise ArgumentError(f"the {name} clip has infinite numbers or NaN: a smaller step, or a wider --dtype")
        maps[name] = captured
    report = _report(job, words, times, clips, guided_run)

    scratch = scratch or job.output.resolve().parent
    with tempfile.TemporaryDirectory(prefix=".cvg-", dir=scratch) as folder:
        try:
            with timed(times, "write"):
                names = _write(Path(folder), job, clips, maps, guided_run.history)
            report["files"] = sorted([*names, "report.json"])
            write_text(Path(folder) / "report.json", json.dumps(report, indent=2) + "\n")
        finally:  # should a picture fail, the clips before it are kept
            job.output.mkdir(exist_ok=True)
            for path in sorted(Path(folder).iterdir(), key=lambda path: (path.name == "report.json", path.name)):
                _move(path, job.output / path.name)
    return report


def _move(path: Path, to: Path) -> None:
    """Gives a file its place in one step, on another file system too."""
    try:
        os.replace(path, to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise WritingError(f"{to} cannot be written, what was there is kept: {error.strerror}") from error
        with written(to) as new:
            shutil.copyfile(path, new)


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Notes the seconds that a block takes, what it has given a GPU to do included."""
    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[name] = round(time.perf_counter() - began, 3)


def load_pipeline(job: Job) -> Any:
    """Loads the pipeline of a job, on its device and in its dtype.

    Raises:
        ArgumentError: if there is none.
    """
    if job.model is None:
        from cvg_kernels.shapes import pipeline

        return pipeline.load_pipeline(None, job.device, getattr(torch, job.dtype))
    from diffusers import DiffusionPipeline, __version__

    # Releases before 0.40 know it by its old name, and leave aside what they do not know.
    newer = tuple(map(int, __version__.split(".")[:2])) >= (0, 40)
    options = {"dtype" if newer else "torch_dtype": getattr(torch, job.dtype)}
    options |= options_for(job.model)
    try:
        if Path(job.model).is_dir():
            check_pipeline(Path(job.model))
        pipe = DiffusionPipeline.from_pretrained(job.model, **options)
    except Exception as error:  # what a folder or the hub holds may be anything
        reason = reason_of(error, job.model)
        raise ArgumentError(f"--model {job.model!r} cannot be loaded: {reason}") from error
    return pipe.to(job.device)


def _call(pipe: VideoPipeline, job: Job) -> torch.Tensor:
    """Runs the pipeline and returns frames `[F, 3, H, W]` in [0, 1] on the CPU."""
    if job.model is None:
        from cvg_kernels.shapes.world import SIZE

        size = {"height": SIZE, "width": SIZE}
    else:
        size = {"height": job.height, "width": job.width}
    options = {name: value for name, value in size.items() if value is not None}
    if job.negative_prompt is not None:
        options["negative_prompt"] = job.negative_prompt
    known = signature(pipe.__call__).parameters
    # Latte's and Sana's pipelines have names of their own for it.
    lengths = ("num_frames", "video_length", "frames")
    options[next(name for name in lengths if name in known)] = job.frames
    if "guidance_scale" in known:  # a guider has it in newer pipelines
        options["guidance_scale"] = job.guidance_scale
    frames = pipe(
        prompt=job.prompt,
        num_inference_steps=job.steps,
        generator=torch.Generator().manual_seed(job.seed),
        output_type="pt",
        **options,
    ).frames[0]
    return frames.float().cpu()


def _report(job: Job, words: list, times: dict, clips: dict, guided_run: Run) -> dict[str, Any]:
    verdicts = {}
    if job.model is None:
        verdicts = {name: _verdict(clip, job.prompt) for name, clip in clips.items()}
    return {
        "job": {name: str(value) if name == "output" else value for name, value in asdict(job).items()},
        "words": [word if isinstance(word, str) else word[0] for word in words],
        "versions": versions(),
        "devices": devices(),
        "seconds": times,
        "peak_memory_mib": peak_memory(),
        "guided_steps": guided_run.guided_steps,
        "loss": [
            {"step": entry["step"], "iteration": entry["iteration"], "loss": float(entry["loss"].mean())}
            for entry in guided_run.history
        ],
        "oracle": verdicts,
    }


def _verdict(clip: torch.Tensor, prompt: str) -> dict[str, bool]:
    """What the oracle says of a clip; of each state in its part of it, if the prompt has several."""
    from cvg_kernels.shapes.oracle import judge
    from cvg_kernels.shapes.world import parse_caption

    states = split_at_then(prompt)
    parts = clip.split(math.ceil(len(clip) / len(states)))
    each = [asdict(judge(part, parse_caption(s))) for part, s in zip(parts, states, strict=False)]
    return {kind: all(verdict[kind] for verdict in each) for kind in each[0]}


def peak_memory() -> float:
    """The GPU's high-water mark where there is one, else the process's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # which accelerate brings

        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _write(folder: Path, job: Job, clips: dict, maps: dict, history: list) -> list[str]:
    """Clips, contact sheet, heat maps, a page to look at them, and the loss curve."""
    words = job.shown_words
    for name, clip in clips.items():
        viz.save_gif(clip, folder / f"{name}.gif")
        viz.save_mp4(clip, folder / f"{name}.mp4")
    viz.save_png(viz.contact_sheet(clips), folder / "contact_sheet.png")
    for name, captured in maps.items() if words else ():
        rows = {name: clips[name]}
        for word in words:
            text, occurrence = (word, 0) if isinstance(word, str) else word
            heat = captured.heat_map(text, occurrence)
            rows[f"where {text!r} looked"] = viz.overlay(clips[name], heat)
        viz.save_png(viz.contact_sheet(rows), folder / f"heat_maps_{name}.png")
    if words:
        both = {name: (clips[name], captured) for name, captured in maps.items()}
        write_viewer(folder / "index.html", both, prompt=job.prompt)
    if history:
        viz.loss_curve(history, folder / "loss.png")
    return sorted(path.name for path in folder.iterdir())
