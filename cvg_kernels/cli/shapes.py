"""`cvg-kernels shapes`: train the shapes pipeline, or score it with and without guidance, on clips short or long."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cvg_kernels.errors import ArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `shapes train`, `shapes eval` and `shapes long`."""
    from cvg_kernels.shapes.train import Recipe

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train the pipeline from nothing; made again, goes on")
    train.add_argument("--output", type=Path, default=Path("shapes-run"), help="the run's folder")
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.add_argument("--processes", type=int, default=3, help="on a CPU; part of the recipe")
    for name, value in vars(Recipe()).items():
        train.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)

    score = actions.add_parser("eval", help="score guidance methods on two-object prompts")
    score.add_argument(
        "--guidance",
        default="none,vico",
        help="methods, separated by commas, each as for generate: none,gen1:temporal_scale=2,vico+gen1",
    )
    score.add_argument("--prompts", type=int, default=200)
    score.add_argument("--steps", type=int, default=None, help="denoising steps")

    longer = actions.add_parser("long", help="score VSTAR's ingredients on long clips that change")
    longer.add_argument("--prompts", type=int, default=60)
    longer.add_argument("--frames", type=int, default=24, help="length of the clips")
    longer.add_argument("--sigma", type=float, default=16.0, help="width of the band, in frames")
    longer.add_argument("--strength", type=float, default=1.0, help="of the band")

    for scored in (score, longer):
        scored.add_argument("--seed", type=int, default=0)
        scored.add_argument("--model", type=Path, help="a pipeline folder; default: shipped")
        scored.add_argument("--device", default="cpu")
        scored.add_argument("--json", type=Path, help="also write the report here")


def run(options: argparse.Namespace) -> int:
    """Trains or scores."""
    import torch

    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {options.device} cannot be used: {error}") from None
    if options.action == "train":
        return _train(options, device)
    if options.prompts < 2:
        raise ArgumentError(f"--prompts must be at least 2, got {options.prompts}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ArgumentError(f"--json must lie in a folder that exists, got {options.json}")
    return _score(options, device) if options.action == "eval" else _score_long(options, device)


def _train(options: argparse.Namespace, device) -> int:
    from cvg_kernels.shapes.train import Recipe, train

    recipe = Recipe(**{name: getattr(options, name) for name in vars(Recipe())})
    processes = options.processes if device.type == "cpu" else 1
    print(train(options.output, recipe, device=device, processes=processes))
    return 0


def _score(options: argparse.Namespace, device) -> int:
    from rich.progress import Progress

    from cvg_kernels.guidance.methods import method_named
    from cvg_kernels.shapes.evaluate import evaluate, print_report
    from cvg_kernels.shapes.pipeline import STEPS, load_pipeline

    methods = {name: method_named(name) for name in options.guidance.split(",")}
    pipe = load_pipeline(options.model, device)
    with Progress(transient=True) as bar:
        tasks = {name: bar.add_task(name, total=options.prompts) for name in methods}
        report = evaluate(
            pipe,
            methods,
            model="shapes (shipped)" if options.model is None else str(options.model),
            prompts=options.prompts,
            seed=options.seed,
            steps=options.steps or STEPS,
            progress=lambda name, done: bar.update(tasks[name], completed=done),
        )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)
    return 0


def _score_long(options: argparse.Namespace, device) -> int:
    from rich.progress import Progress

    from cvg_kernels.shapes.long_clips import arms, evaluate_long, print_long
    from cvg_kernels.shapes.pipeline import load_pipeline

    if options.frames < 2:
        raise ArgumentError(f"--frames must be at least 2, got {options.frames}")
    methods = arms(options.sigma, options.strength)
    pipe = load_pipeline(options.model, device)
    with Progress(transient=True) as bar:
        tasks = {name: bar.add_task(name, total=options.prompts) for name in methods}
        report = evaluate_long(
            pipe,
            frames=options.frames,
            prompts=options.prompts,
            seed=options.seed,
            methods=methods,
            progress=lambda name, done: bar.update(tasks[name], completed=done),
        )
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print_long(report)
    return 0
