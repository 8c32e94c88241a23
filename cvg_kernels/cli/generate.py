"""`cvg-kernels generate`: a clip without and with guidance, and a report; of one prompt, or of a file of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cvg_kernels.cli.arguments import add_settings, path, settings_of
from cvg_kernels.cli.defaults import defaults_of
from cvg_kernels.errors import ArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`."""
    parser.add_argument(
        "prompt", nargs="?", help='what to show: "a red circle moving left and a blue square moving right"'
    )
    parser.add_argument(
        "--prompts",
        type=path,
        metavar="FILE",
        help="many prompts: a text file, one a line, or JSON Lines with prompt, words, seed, guidance, model and any "
        "other setting of this command, which take precedence over those given here. Each gets a folder in OUTPUT, "
        "and OUTPUT/manifest.jsonl says what became of it; run again to resume. Several processes: accelerate launch "
        "-m cvg_kernels generate …, torchrun -m, or srun",
    )
    parser.add_argument(
        "--attempts",
        type=int,
        help="how often a prompt of FILE may fail, all runs together, before it is left alone; default: 1",
    )
    parser.add_argument(
        "--guidance",
        help="the guidance method, with options after colons, several joined by a plus: "
        "cvg (the default, for the shapes pipeline), vico, vstar, gen1, flowmo, temporal-band or none; "
        "gen1:temporal_scale=2, vico:stop=0.2+gen1",
    )
    parser.add_argument("--words", help="words to guide and to show, separated by commas; default: all content words")
    parser.add_argument("--output", type=path, default=Path("out"), help="folder for the results")
    parser.add_argument(
        "--model",
        help="a local folder or hub id (AnimateDiff, Wan, CogVideoX, HunyuanVideo, LTX …); default: the shapes "
        "pipeline, which ships",
    )
    parser.add_argument("--negative-prompt", help="what the clip should not show")
    settings = (
        ("seed", int, "seed of the noise that both clips begin with"),
        ("steps", int, "denoising steps"),
        ("frames", int, "frames of the clip"),
        ("height", int, "in pixels; default: the pipeline's own"),
        ("width", int, "in pixels; default: the pipeline's own"),
        ("guidance_scale", float, "of classifier-free guidance"),
    )
    add_settings(parser, defaults_of("cvg_kernels.generate", "Job"), settings)


def run(options: argparse.Namespace) -> int:
    """Does the job and prints a short table; returns 2 if no step was guided, 1 if prompts of a file failed."""
    if (options.prompt is None) == (options.prompts is None):
        given = "both" if options.prompts else "neither"
        raise ArgumentError(f"prompt or --prompts FILE must be given, got {given}")
    if options.attempts is not None and (options.prompts is None or options.attempts < 1):
        raise ArgumentError(f"--attempts must be at least 1 and goes with --prompts, got {options.attempts}")
    from cvg_kernels.generate import Job
    from cvg_kernels.generate import run as do

    fields = settings_of(options, Job)
    if options.prompts is not None:
        return _many(options, fields)
    report = do(Job(**fields))
    print(f"{'':10}  seconds  present  bound  direction  all right")
    for name in ("unguided", "guided"):
        verdict = report["oracle"].get(name, {})
        cells = [
            {True: "yes", False: "no"}.get(verdict.get(kind), "-")
            for kind in ("present", "bound", "direction", "all_right")
        ]
        print(f"{name:10}  {report['seconds'][name]:7.2f}  {cells[0]:7}  {cells[1]:5}  {cells[2]:9}  {cells[3]}")
    losses = [entry["loss"] for entry in report["loss"]]
    if losses:
        print(f"loss {losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} updates")
    print(f"guided steps: {report['guided_steps']}")
    print(
        f"peak memory {report['peak_memory_mib']:.0f} MiB; written to {options.output}/: {', '.join(report['files'])}"
    )
    if report["guided_steps"] == 0:
        print("cvg-kernels generate: no denoising step was guided", file=sys.stderr)
        return 2
    return 0


def _many(options: argparse.Namespace, fields: dict) -> int:
    """Does a file of prompts, with a line for each and a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from cvg_kernels.batch import run_all
    from cvg_kernels.generate import Job
    from cvg_kernels.processes import Place
    from cvg_kernels.prompt_file import read_prompts

    place, attempts = Place.of_this_process(), options.attempts or 1
    fields["device"] = place.device(options.device)
    items = read_prompts(options.prompts, Job(**fields | {"prompt": ""}))
    if options.output.exists() and not options.output.is_dir():
        raise ArgumentError(f"--output must be a folder, got the file {options.output}")
    if not options.output.resolve().parent.is_dir():
        raise ArgumentError(f"--output must lie in a folder that exists, got {options.output}")
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), Remaining())
    console = Console(stderr=True)
    shown = place.rank == 0 and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=len(items))

        def tell(now) -> None:
            bar.update(task, completed=now.done + now.failed)
            if now.entry is not None:
                print(_line(now), flush=True)

        end = run_all(items, options.output, attempts=attempts, place=place, told=tell)
    if place.rank == 0:
        print(f"{end.done} of {end.total} done, {end.failed} failed; {options.output}/manifest.jsonl")
    if end.failed:
        if place.rank == 0:
            print(
                f"cvg-kernels generate: {end.failed} prompts failed; --attempts {attempts + 1} tries them again",
                file=sys.stderr,
            )
        return 1
    return 0


def _line(now) -> str:
    """What is printed of a prompt."""
    entry = now.entry
    told = f"[{now.done + now.failed}/{now.total}] line {entry['line']}: {entry['status']}, {entry['seconds']:.1f} s"
    return f"{told}: {entry['error']}" if entry["error"] else told
