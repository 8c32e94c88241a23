"""`cvg-kernels shapes`: train the shapes pipeline, or score it with guidance, at one setting or along an option."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cvg_kernels.errors import ArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `shapes train`, `shapes eval` and `shapes sweep`."""
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
    _add_scoring(score)

    along = actions.add_parser(
        "sweep", help="score a guidance method at several values of an option"
    )
    along.add_argument("--method", default="cvg", help="as for generate: cvg, vico:iterations=2")
    along.add_argument("--option", required=True, help="a number of the method: step_size")
    along.add_argument("--values", required=True, help="separated by commas: 0,0.01,0.05")
    _add_scoring(along)
    along.set_defaults(prompts=60, seed=21)  # not eval's: what is chosen here is reported there


def _add_scoring(score: argparse.ArgumentParser) -> None:
    """What `eval` and `sweep` share."""
    score.add_argument("--prompts", type=int, default=200)
    score.add_argument("--seed", type=int, default=0)
    score.add_argument("--steps", type=int, default=None, help="denoising steps")
    score.add_argument(
        "--model", type=Path, default=None, help="a pipeline folder; default: shipped"
    )
    score.add_argument("--device", default="cpu")
    score.add_argument("--json", type=Path, default=None, help="also write the report here")


def run(options: argparse.Namespace) -> int:
    """Trains or scores."""
    import torch

    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {options.device} cannot be used: {error}") from None
    return {"train": _train, "eval": _eval, "sweep": _sweep}[options.action](options, device)


def _train(options: argparse.Namespace, device) -> int:
    from cvg_kernels.shapes.train import Recipe, train

    recipe = Recipe(**{name: getattr(options, name) for name in vars(Recipe())})
    processes = options.processes if device.type == "cpu" else 1
    print(train(options.output, recipe, device=device, processes=processes))
    return 0


def _eval(options: argparse.Namespace, device) -> int:
    from cvg_kernels.guidance.methods import method_named
    from cvg_kernels.shapes.evaluate import evaluate

    methods = {name: method_named(name) for name in options.guidance.split(",")}
    return _score(
        options, device, list(methods), lambda pipe, **how: evaluate(pipe, methods, **how)
    )


def _sweep(options: argparse.Namespace, device) -> int:
    from cvg_kernels.guidance.methods import method_named
    from cvg_kernels.shapes.sweep import numbers, specifications, sweep

    values = numbers(options.values)
    names = specifications(options.method, options.option, values)
    for name in names:  # says what is wrong before the pipeline is loaded
        method_named(name)
    return _score(
        options,
        device,
        names,
        lambda pipe, **how: sweep(pipe, options.method, options.option, values, **how),
    )


def _score(
    options: argparse.Namespace, device, names: Sequence[str], score: Callable[..., dict[str, Any]]
) -> int:
    """Makes a report on methods of some names, shows how far it is, prints and writes it."""
    from rich.progress import Progress

    from cvg_kernels.shapes.evaluate import print_report
    from cvg_kernels.shapes.pipeline import STEPS, load_pipeline

    if options.prompts < 2:
        raise ArgumentError(f"--prompts must be at least 2, got {options.prompts}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ArgumentError(f"--json must lie in a folder that exists, got {options.json}")
    pipe = load_pipeline(options.model, device)
    with Progress(transient=True) as bar:
        tasks = {name: bar.add_task(name, total=options.prompts) for name in names}
        report = score(
            pipe,
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
