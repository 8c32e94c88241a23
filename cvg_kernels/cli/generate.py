"""`cvg-kernels generate`: a clip without and with guidance, and a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cvg_kernels.generate import Job
from cvg_kernels.generate import run as do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`."""
    parser.add_argument(
        "prompt", help='e.g. "a red circle moving left and a blue square moving right"'
    )
    parser.add_argument(
        "--guidance",
        help="the guidance method, with options after colons, several joined by a plus: "
        "cvg (the default, for the shapes pipeline), vico, gen1:temporal_scale=2, vico:stop=0.2+gen1",
    )
    parser.add_argument("--words", help="words to guide and to show, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument(
        "--model", help="a local folder or hub id (AnimateDiff, ModelScope, Latte, Wan, CogVideoX)"
    )
    parser.add_argument("--negative-prompt", help="what the clip should not show")
    for name, kind, default in (
        ("seed", int, 0),
        ("steps", int, 20),
        ("frames", int, 8),
        ("height", int, None),
        ("width", int, None),
        ("guidance-scale", float, 3.0),
        ("dtype", str, "float32"),
        ("device", str, "cpu"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)


def run(options: argparse.Namespace) -> int:
    """Does the job and prints a short table; returns 2 if no step was guided."""
    fields = {name: getattr(options, name) for name in vars(options) if name in Job.__annotations__}
    fields["words"] = [word.strip() for word in options.words.split(",")] if options.words else []
    report = do(Job(**fields))
    print(f"{'':10}  seconds  present  bound  direction  all right")
    for name in ("unguided", "guided"):
        verdict = report["oracle"].get(name, {})
        cells = [{True: "yes", False: "no"}.get(verdict.get(kind), "-") for kind in
                 ("present", "bound", "direction", "all_right")]  # fmt: skip
        print(
            f"{name:10}  {report['seconds'][name]:7.2f}  {cells[0]:7}  {cells[1]:5}  {cells[2]:9}  {cells[3]}"
        )
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
