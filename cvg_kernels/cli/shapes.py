"""`cvg-kernels shapes`: train the shapes pipeline, or score guidance on it:
methods, along an option, on long clips.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cvg_kernels.cli.arguments import add_recipe, path
from cvg_kernels.cli.defaults import defaults_of
from cvg_kernels.errors import ArgumentError, nearest
from cvg_kernels.processes import Place
from cvg_kernels.writing import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `shapes train`, `shapes eval`, `shapes sweep` and `shapes long`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train the pipeline from scratch; run again to resume")
    train.add_argument("--output", type=path, default=Path("shapes-run"), help="the run's folder")
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.add_argument("--processes", type=int, default=3, help="on a CPU; part of the recipe")
    add_recipe(train, defaults_of("cvg_kernels.shapes.train", "Recipe"))

    score = actions.add_parser("eval", help="score guidance methods on two-object prompts")
    score.add_argument(
        "--guidance",
        default="none,cvg",
        help="methods, separated by commas, each as for generate: none,gen1:temporal_scale=2,cvg+gen1",
    )
    _add_scoring(score)

    along = actions.add_parser("sweep", help="score a guidance method at several values of an option")
    along.add_argument("--method", default="cvg", help="as for generate: cvg, vico:iterations=2")
    along.add_argument("--option", required=True, help="a number of the method: step_size")
    along.add_argument("--values", required=True, help="separated by commas: 0,0.01,0.05")
    # not the prompts of eval: what is chosen here is reported there
    _add_scoring(along, prompts=60, seed=21)

    longer = actions.add_parser("long", help="score VSTAR's ingredients on long clips that change")
    longer.add_argument("--frames", type=int, default=24, help="length of the clips")
    longer.add_argument("--sigma", type=float, default=16.0, help="width of the band, in frames")
    longer.add_argument("--strength", type=float, default=1.0, help="of the band")
    _add_scoring(longer, prompts=60)

    edits = actions.add_parser("edits", help="score the editor, and what one would do without it")
    edits.add_argument("--prompts", type=int, default=100, help="edits of each kind")
    edits.add_argument("--seed", type=int, default=0, help="seed of the clips and the noise")
    edits.add_argument("--model", type=path, help="an editor's folder; default: shipped")
    edits.add_argument(
        "--training-run", type=path, help="a folder of `shapes train`; what it has trained otherwise is scored, too"
    )
    edits.add_argument("--groups", help="of the comparisons, by commas; default: all")
    edits.add_argument("--device", default="cpu", help="cpu or cuda")
    edits.add_argument("--json", type=path, help="also write the report here")


def _add_scoring(parser: argparse.ArgumentParser, prompts: int = 200, seed: int = 0) -> None:
    """The options that every scoring takes."""
    steps = defaults_of("cvg_kernels.shapes.pipeline")["STEPS"]
    parser.add_argument("--prompts", type=int, default=prompts, help="how many, each of which makes a clip a method")
    parser.add_argument("--seed", type=int, default=seed, help="seed of the prompts and the noise")
    parser.add_argument("--steps", type=int, default=steps, help="denoising steps")
    parser.add_argument("--model", type=path, help="a pipeline folder; default: shipped")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=path, help="also write the report here")
    parser.epilog = "Several processes share the clips: accelerate launch -m cvg_kernels shapes eval …"


def run(options: argparse.Namespace) -> int:
    """Trains or scores."""
    import torch

    try:
        place = Place.of_this_process()
        device = torch.device(place.device(options.device))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {options.device} cannot be used: {error}") from None
    if options.action == "train":
        return _train(options, device)
    if options.prompts < 2:
        raise ArgumentError(f"--prompts must be at least 2, got {options.prompts}")
    if getattr(options, "steps", 1) < 1:
        raise ArgumentError(f"--steps must be at least 1, got {options.steps}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ArgumentError(f"--json must lie in a folder that exists, got {options.json}")
    actions = {"eval": _eval, "sweep": _sweep, "long": _long, "edits": _edits}
    return actions[options.action](options, device)


def _train(options: argparse.Namespace, device) -> int:
    from cvg_kernels.shapes.train import Recipe, train

    recipe = Recipe(**{name: getattr(options, name) for name in vars(Recipe())})
    processes = options.processes if device.type == "cpu" else 1
    print(train(options.output, recipe, device=device, processes=processes))
    return 0


def _eval(options: argparse.Namespace, device) -> int:
    from cvg_kernels.guidance.methods import methods_named
    from cvg_kernels.shapes.evaluation import evaluate, print_report

    methods = methods_named(options.guidance)
    return _score(
        options,
        device,
        list(methods),
        lambda pipe, **how: evaluate(pipe, methods, model=_name(options), **how),
        print_report,
    )


def _sweep(options: argparse.Namespace, device) -> int:
    from cvg_kernels.guidance.methods import method_named
    from cvg_kernels.shapes.evaluation import print_report
    from cvg_kernels.shapes.sweep import numbers, specifications, sweep

    values = numbers(options.values)
    names = specifications(options.method, options.option, values)
    for name in names:  # says what is wrong before the pipeline is loaded
        method_named(name)

    def score(pipe, **how):
        return sweep(pipe, options.method, options.option, values, model=_name(options), **how)

    return _score(options, device, names, score, print_report)


def _long(options: argparse.Namespace, device) -> int:
    from cvg_kernels.shapes.long_clips import arms, evaluate_long, print_long

    if options.frames < 2:
        raise ArgumentError(f"--frames must be at least 2, got {options.frames}")
    methods = arms(options.sigma, options.strength)
    return _score(
        options,
        device,
        list(methods),
        lambda pipe, **how: evaluate_long(pipe, frames=options.frames, methods=methods, **how),
        print_long,
    )


def _edits(options: argparse.Namespace, device) -> int:
    from rich.progress import Progress

    from cvg_kernels.shapes.edit_direction import direction_guidance
    from cvg_kernels.shapes.edit_encoders import measure_encoders
    from cvg_kernels.shapes.edit_stages import trained_otherwise
    from cvg_kernels.shapes.editor import load_editor
    from cvg_kernels.shapes.edits import evaluate_edits, groups, print_edits
    from cvg_kernels.shapes.pipeline import load_pipeline

    place = Place.of_this_process()
    pipe = load_editor(options.model, device)
    others = {} if options.training_run is None else trained_otherwise(options.training_run)
    measured = groups(pipe, load_pipeline(device=device), edits=options.prompts, seed=options.seed, **others)
    chosen = list(measured) if options.groups is None else options.groups.split(",")
    unknown = [name for name in chosen if name not in measured]
    if unknown:
        raise ArgumentError(
            f"--groups must be of {', '.join(measured)}, got {', '.join(unknown)}{nearest(unknown[0], measured)}"
        )
    measured = {name: measured[name] for name in chosen}
    with Progress(transient=True, disable=place.rank > 0) as bar:
        tasks = {name: bar.add_task(name, total=options.prompts) for group in measured.values() for name in group.arms}
        report = evaluate_edits(
            measured,
            model=_name(options),
            seed=options.seed,
            place=place,
            progress=lambda name, done: bar.update(tasks[name], completed=done),
        )
    if place.rank > 0:
        return 0
    report["encoders"] = measure_encoders(pipe, seed=options.seed)
    report["cvg"] = direction_guidance(pipe, edits=options.prompts, seed=options.seed)
    if options.json is not None:
        write_json(options.json, report)
    print_edits(report)
    return 0


def _name(options: argparse.Namespace) -> str:
    """What a report calls the model."""
    return "shapes (shipped)" if options.model is None else str(options.model)


def _score(
    options: argparse.Namespace,
    device,
    names: Sequence[str],
    score: Callable[..., dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> int:
    """Makes a report on methods of some names, shows how far it is, writes and prints it."""
    from rich.progress import Progress

    from cvg_kernels.shapes.pipeline import load_pipeline

    place = Place.of_this_process()
    pipe = load_pipeline(options.model, device)
    with Progress(transient=True, disable=place.rank > 0) as bar:
        tasks = {name: bar.add_task(name, total=options.prompts) for name in names}
        report = score(
            pipe,
            prompts=options.prompts,
            seed=options.seed,
            steps=options.steps,
            progress=lambda name, done: bar.update(tasks[name], completed=done),
            place=place,
        )
    if place.rank > 0:
        return 0
    if options.json is not None:
        write_json(options.json, report)
    show(report)
    return 0
