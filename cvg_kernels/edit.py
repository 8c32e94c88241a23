"""The job of `cvg-kernels edit`: a clip, its structure with other content, and a report of what changed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from cvg_kernels import viz
from cvg_kernels.capturing import capture
from cvg_kernels.environment import devices, versions
from cvg_kernels.errors import ArgumentError, is_whole, nearest
from cvg_kernels.generate import check_device, check_dtype, check_output, check_seed, peak_memory, timed
from cvg_kernels.guidance import CVG, Gen1, Together
from cvg_kernels.guidance.methods import method_named
from cvg_kernels.image_files import fit_square, read_image
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.tokens import EncodedText
from cvg_kernels.video_files import check_video, read_video
from cvg_kernels.writing import write_json, written_folder

if TYPE_CHECKING:
    from cvg_kernels.shapes.oracle import Seen


@dataclass
class EditJob:
    """What `cvg-kernels edit` is asked to do."""

    output: Path
    video: Path | None = None  #: `None`: a clip of the shapes world, drawn from the seed
    prompt: str | None = None
    image: Path | None = None
    structure: int = 3
    temporal_scale: float = 1.0
    guidance: str | None = None  #: further methods, as `generate` names them
    #: Words whose heat maps are shown, and which are guided.
    words: list[str] = field(default_factory=list)
    negative_prompt: str | None = None
    model: Path | None = None  #: folder of a `StructureContentPipeline`; `None`: the one that ships
    depth_model: str | None = None  #: a depth model of transformers, for the pipeline's own
    frames: int = 8
    start: int = 0
    every: int | None = None
    fit: Literal["crop", "pad"] = "crop"  #: how frames become squares
    fps: int = 6  #: frames a second of the clips that are written
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 3.0
    dtype: str = "float32"
    device: str = "cpu"

    def check(self) -> None:
        """Checks everything that can be checked before a model is loaded.

        Raises:
            ArgumentError: for what does not fit.
        """
        from cvg_kernels.editing.structure import MOST_ROUNDS

        if self.prompt is None and self.image is None:
            raise ArgumentError("--prompt or --image must be given, got neither")
        if self.prompt is not None and not self.prompt.strip():
            raise ArgumentError("--prompt must not be empty")
        if not is_whole(self.structure, 0) or self.structure > MOST_ROUNDS:
            raise ArgumentError(f"--structure must be from 0 to {MOST_ROUNDS}, got {self.structure}")
        counts = {"steps": 1, "frames": 2, "start": 0, "every": 1, "fps": 1}
        for name, least in counts.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError(f"--{name} must be at least {least}, got {value}")
        check_seed(self.seed)
        for name in ("guidance_scale", "temporal_scale"):
            if not math.isfinite(getattr(self, name)):
                option = name.replace("_", "-")
                raise ArgumentError(f"--{option} must be finite, got {getattr(self, name)}")
        if self.fit not in ("crop", "pad"):
            raise ArgumentError(f"--fit must be crop or pad, got {self.fit!r}{nearest(self.fit, ('crop', 'pad'))}")
        check_dtype(self.dtype)
        if self.words and self.prompt is None:
            raise ArgumentError("--words must be those of a --prompt, got none")
        self.methods()
        if self.video is not None:
            check_video(self.video, self.start, self.every)
        check_device(self.device)
        check_output(self.output)
        if self.model is None:
            self.asked()

    def methods(self) -> list[Any]:
        """The guidance methods, Gen-1's temporal scale first; one that changes nothing is left out.

        Raises:
            ArgumentError: for one that does not fit.
        """
        methods = [] if self.temporal_scale == 1 else [Gen1(temporal_scale=self.temporal_scale)]
        other = None if self.guidance is None else method_named(self.guidance, self.words or None)
        several = other.methods if isinstance(other, Together) else (other,)
        if methods and any(isinstance(one, Gen1) for one in several):
            raise ArgumentError(
                "--temporal-scale and gen1 of --guidance set the same: give one of them, got "
                f"{self.temporal_scale:g} and {self.guidance!r}"
            )
        return methods if other is None else [*methods, other]

    def asked(self) -> tuple[Any, ...]:
        """The things of the prompt; none without a prompt.

        Raises:
            ArgumentError: if it is no caption of the shapes world.
        """
        from cvg_kernels.shapes.world import parse_caption

        try:
            return () if self.prompt is None else parse_caption(self.prompt, motion=False)
        except ValueError as error:
            raise ArgumentError(
                f"--prompt does not fit the shapes world (give another editor with --model): {error}"
            ) from None


@dataclass(frozen=True)
class _Input:
    clip: torch.Tensor  # [F, 3, H, W] in [0, 1]
    notes: tuple[str, ...]
    indices: tuple[int, ...] | None = None


def run(job: EditJob, pipe: VideoPipeline | None = None, *, bars: bool = True) -> dict[str, Any]:
    """Does the job and returns the report; the output folder is filled at the end, or not at all.

    Args:
        job: what is asked for.
        pipe: the editor; `None` loads it.
        bars: whether the steps are shown as they pass, where standard error is a terminal.

    Raises:
        ArgumentError: for what does not fit; nothing is written then.
    """
    job.check()
    times: dict[str, float] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of the job before
    image, notes = _read_content(job)
    with timed(times, "load"):
        pipe = pipe or _load(job)
    most = pipe.unet.config.motion_max_seq_length
    if job.frames > most:
        raise ArgumentError(f"--frames must be at most {most} with this model, got {job.frames}")
    with timed(times, "read"):
        given = _read(job, pipe.unet.config.sample_size * pipe.vae_scale_factor)
    if job.words:  # one that is not there is told before anything runs
        EncodedText.of_prompt(pipe.tokenizer, job.prompt).find(job.words)
    depth = None if job.depth_model is None else _depth(job, given.clip)

    shown = bars and sys.stderr.isatty()
    pipe.set_progress_bar_config(desc="edit", disable=not shown, leave=False)
    with timed(times, "edit"), ExitStack() as attached:
        methods = [_fitted(method, job, pipe) for method in job.methods()]
        runs = [attached.enter_context(method.attach(pipe)) for method in methods]
        seen = attached.enter_context(capture(pipe, words=job.words)) if job.words else None
        output = pipe(
            video=given.clip,
            prompt=job.prompt,
            image=image,
            structure=job.structure,
            depth=depth,
            negative_prompt=job.negative_prompt,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            generator=torch.Generator().manual_seed(job.seed),
            output_type="pt",
        )
    edited = output.frames[0].float().cpu()
    if not bool(edited.isfinite().all()):
        raise ArgumentError(
            "the edited clip has infinite numbers or NaN: a smaller --guidance-scale, or a wider --dtype"
        )
    report = {
        "job": {n: str(v) if isinstance(v, Path) else v for n, v in asdict(job).items()},
        "methods": [repr(method) for method in job.methods()],  # with every setting, chosen or not
        "input": {"frames": given.indices, "notes": [*given.notes, *notes]},
        "versions": versions(),
        "devices": devices(),
        "seconds": times,
        "peak_memory_mib": peak_memory(),
        "guided_steps": sum(run.guided_steps for run in runs),
        "oracle": verdict(given.clip, edited, job.asked()) if job.model is None else {},
    }
    with written_folder(job.output, keep=True) as folder:
        with timed(times, "write"):
            _write(folder, given.clip, output.structure[0].cpu(), edited, seen, job)
        report["files"] = sorted([*(path.name for path in folder.iterdir()), "report.json"])
        write_json(folder / "report.json", report)
    return report


def _fitted(method: Any, job: EditJob, pipe: VideoPipeline) -> Any:
    """A method for the editor: CVG's classifier learnt to read the shapes pipeline,
    which the shipped editor began as.
    """
    if isinstance(method, Together):
        return Together(tuple(_fitted(one, job, pipe) for one in method.methods))
    if isinstance(method, CVG) and method.classifier is None and job.model is None:
        return replace(method, classifier=method.reader.taken_to(pipe))
    return method


def _load(job: EditJob) -> Any:
    from cvg_kernels.shapes.editor import load_editor

    return load_editor(job.model, job.device, getattr(torch, job.dtype))


def _read(job: EditJob, size: int) -> _Input:
    """The clip to edit."""
    if job.video is not None:
        found = read_video(job.video, job.frames, start=job.start, every=job.every, size=size, fit=job.fit)
        return _Input(found.frames, found.notes, found.indices)
    from cvg_kernels.shapes.world import random_scene, random_things, render

    rng = np.random.default_rng(abs(job.seed))
    asked = () if job.model is not None else job.asked()
    scene = random_scene(rng, random_things(rng, 2 if len(asked) > 1 else 1), frames=job.frames)
    clip = torch.stack([fit_square(frame, size) for frame in render([scene])[0]])
    return _Input(clip, (f"drew a clip: {scene.caption}",))


def _read_content(job: EditJob) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """The picture of the content as a square, if there is one, and what was done to it."""
    if job.image is None:
        return None, ()
    image, notes = read_image(job.image)
    height, width = image.shape[1:]
    if height != width:
        notes = (*notes, "cut to the square in the middle")
    return fit_square(image, min(height, width)), tuple(f"image: {note}" for note in notes)


def _depth(job: EditJob, clip: torch.Tensor) -> torch.Tensor:
    """The depth of the clip by a model that the user names."""
    from cvg_kernels.editing.depth import estimate_depth, load_depth_model

    device = torch.device(job.device)
    model, processor = load_depth_model(job.depth_model, device)
    return estimate_depth(model, clip.to(device), processor)


def verdict(before: torch.Tensor, after: torch.Tensor, asked: Sequence[Any]) -> dict[str, Any]:
    """Reads with the oracle what an edit of the shapes world did.

    Args:
        before: the clip, `[F, 3, H, W]` in [0, 1].
        after: the edited clip.
        asked: the things of the prompt.

    Returns:
        `before` and `after`, the things seen; `colours` and `shapes`, whether all that were asked for are seen (a
        shape in its colour; `None` without a prompt); `distance`, the mean distance in pixels from the things before
        to the nearest thing after, and `direction`, whether that moves as it did (`None` if nothing is seen).
    """
    from cvg_kernels.shapes.oracle import look

    first, then = look(before), look(after)
    shape_by_colour = {one.colour: one.shape for one in then}
    nearest = [_nearest(one, then) for one in first if then]
    apart = [distance for distance, _ in nearest if distance is not None]

    def told(seen: Sequence[Any]) -> list[dict[str, Any]]:
        return [{"colour": s.colour, "shape": s.shape, "direction": s.direction} for s in seen]

    return {
        "before": told(first),
        "after": told(then),
        "colours": all(thing.colour in shape_by_colour for thing in asked) if asked else None,
        "shapes": all(shape_by_colour.get(t.colour) == t.shape for t in asked) if asked else None,
        "distance": round(float(np.mean(apart)), 2) if apart else None,
        "direction": all(kept for _, kept in nearest) if nearest else None,
    }


def _nearest(one: Seen, others: Sequence[Seen]) -> tuple[float | None, bool]:
    """The distance to the nearest of other things, where both are seen, and whether it moves in the same direction."""
    apart = {}
    for number, other in enumerate(others):
        distances = np.linalg.norm(one.centres - other.centres, axis=1)
        if np.isfinite(distances).any():
            apart[number] = float(np.nanmean(distances))
    if not apart:
        return None, False
    best = min(apart, key=apart.get)
    return apart[best], others[best].direction == one.direction


def _write(
    folder: Path, before: torch.Tensor, structure: torch.Tensor, after: torch.Tensor, captured: Any, job: EditJob
) -> None:
    """Clips, contact sheet and heat maps."""
    grey = structure[:, None].expand(-1, 3, -1, -1)
    for name, clip in (("input", before), ("structure", grey), ("edited", after)):
        viz.save_gif(clip, folder / f"{name}.gif", job.fps)
        viz.save_mp4(clip, folder / f"{name}.mp4", job.fps)
    rows = {"input": before, "structure": grey, "edited": after}
    viz.save_png(viz.contact_sheet(rows), folder / "contact_sheet.png")
    if job.words:
        rows = {"edited": after}
        for word in job.words:
            rows[f"where {word!r} looked"] = viz.overlay(after, captured.heat_map(word))
        viz.save_png(viz.contact_sheet(rows), folder / "heat_maps.png")
