"""`cvg-kernels edit`: the structure of a clip with other content, and a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cvg_kernels.cli.arguments import add_settings, path, settings_of, whole
from cvg_kernels.cli.defaults import defaults_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edit`."""
    defaults = defaults_of("cvg_kernels.edit", "EditJob")
    parser.add_argument(
        "video",
        nargs="?",
        type=path,
        metavar="INPUT",
        help="a GIF, an MP4 or a folder of frames, cut to a square and to --frames; default: a clip drawn from the "
        "seed",
    )
    parser.add_argument("--prompt", help='what is to be seen: "a blue square"')
    parser.add_argument("--image", type=path, help="a picture of what is to be seen")
    parser.add_argument(
        "--structure",
        type=whole(0, 7),
        default=defaults["structure"],
        help="rounds of blur of the depth that is kept: 0 keeps outlines, 3 places, 7 next to nothing",
    )
    parser.add_argument(
        "--temporal-scale",
        type=float,
        default=defaults["temporal_scale"],
        help="above 1 frames agree more, below 1 they are freer",
    )
    parser.add_argument("--guidance", help="further methods, as for generate: vico, vico:stop=0.2; default: none")
    parser.add_argument("--words", help="words of the prompt to guide and to show, by commas")
    parser.add_argument("--negative-prompt", help="what is not to be seen")
    parser.add_argument("--output", type=path, default=Path("out"), help="folder for the results")
    parser.add_argument(
        "--model", type=path, help="a folder with a StructureContentPipeline; default: the one that ships"
    )
    parser.add_argument(
        "--depth-model",
        help="for real footage: a folder or the Hub's name of a depth model of transformers; what is named is "
        "downloaded; default: the pipeline's own",
    )
    parser.add_argument("--start", type=int, default=defaults["start"], help="first frame of INPUT")
    parser.add_argument(
        "--every", type=int, help="take every n-th frame of INPUT; default: spread over the clip, at most 8 apart"
    )
    parser.add_argument(
        "--fit",
        default=defaults["fit"],
        help="how frames of INPUT become squares: crop cuts the middle, pad adds black",
    )
    parser.add_argument("--fps", type=int, default=defaults["fps"], help="frames a second of what is written")
    settings = (
        ("frames", int, "frames of the clip"),
        ("seed", int, "seed of the noise, and of the clip that is drawn without INPUT"),
        ("steps", int, "denoising steps"),
        ("guidance_scale", float, "how strongly the content is followed"),
    )
    add_settings(parser, defaults, settings)


def run(options: argparse.Namespace) -> int:
    """Does the job and prints what was done; returns 2 if guidance was asked for and no step was guided."""
    from cvg_kernels.edit import EditJob
    from cvg_kernels.edit import run as do

    job = EditJob(**settings_of(options, EditJob))
    report = do(job)
    for note in report["input"]["notes"]:
        print(f"input: {note}")
    oracle = report["oracle"]
    for name in ("before", "after") if oracle else ():
        seen = [" ".join(filter(None, (s["colour"], s["shape"], s["direction"]))) for s in oracle[name]]
        print(f"{name}: {', '.join(seen) or 'nothing that the oracle knows'}")
    if oracle.get("distance") is not None:
        kept = "kept" if oracle["direction"] else "not kept"
        print(f"places {oracle['distance']:.1f} pixels apart, direction {kept}")
    print(f"{report['seconds']['edit']:.1f} s; written to {options.output}/: {', '.join(report['files'])}")
    if job.methods() and report["guided_steps"] == 0:
        print("cvg-kernels edit: no denoising step was guided", file=sys.stderr)
        return 2
    return 0
