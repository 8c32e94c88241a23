"""`cvg-kernels scenes`: train a model of the world of scenes, see how it fails, and score guidance on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from cvg_kernels.cli.arguments import add_recipe
from cvg_kernels.cli.defaults import defaults_of
from cvg_kernels.errors import ArgumentError, nearest
from cvg_kernels.writing import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `scenes train`, `scenes gate`, `scenes eval` and `scenes attribution`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train the pipeline from scratch; run again to resume")
    train.add_argument("--output", type=Path, default=Path("scenes-run"), help="the run's folder")
    train.add_argument("--device", default="cpu", help="cpu or cuda")
    train.add_argument("--processes", type=int, default=2, help="on a CPU; part of the recipe")
    train.add_argument("--network", choices=("unet", "transformer"), default="unet", help="which of the two models")
    add_recipe(train, defaults_of("cvg_kernels.scenes.train", "Recipe"))

    steps = defaults_of("cvg_kernels.shapes.pipeline")["STEPS"]
    gate = actions.add_parser("gate", help="how a model fails, and what its maps tell of it")
    _add_model(gate)
    gate.add_argument("--prompts", type=int, default=30, help="how many")
    gate.add_argument("--seeds", type=int, default=8, help="clips of each prompt")
    gate.add_argument("--steps", type=int, default=steps, help="denoising steps")

    score = actions.add_parser("eval", help="score guidance methods on every kind of prompt")
    _add_model(score)
    score.add_argument("--guidance", default="none,vico", help="methods, separated by commas, each as for generate")
    score.add_argument("--kinds", default="", help="of prompts: things,relation,number,motion; default: all")
    score.add_argument("--prompts", type=int, default=60, help="of each kind")
    score.add_argument("--clips", type=Path, help="keep every clip's verdict in this file, and make none that it has")
    score.add_argument("--steps", type=int, default=steps, help="denoising steps")
    score.add_argument("--device", default="cpu", help="cpu or cuda")

    maps = actions.add_parser("attribution", help="which kind of map lies best on true masks")
    _add_model(maps)
    maps.add_argument("--clips", type=int, default=60, help="of each motion")
    maps.add_argument("--figure", type=Path, help="also draw the table here, a PNG")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="unet", help="unet or transformer, in the sources, or a pipeline folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and the noise")
    parser.add_argument("--json", type=Path, help="also write the report here")


def run(options: argparse.Namespace) -> int:
    """Trains or measures."""
    if options.action == "train":
        return _train(options)
    name = "clips" if options.action == "attribution" else "prompts"
    if getattr(options, name) < 2:
        raise ArgumentError(f"--{name} must be at least 2, got {getattr(options, name)}")
    if getattr(options, "steps", 1) < 1:
        raise ArgumentError(f"--steps must be at least 1, got {options.steps}")
    for name in ("json", "figure", "clips"):
        file = getattr(options, name, None)
        if isinstance(file, Path) and not file.resolve().parent.is_dir():
            raise ArgumentError(f"--{name} must lie in a folder that exists, got {file}")
    report = {"gate": _gate, "eval": _eval, "attribution": _attribution}[options.action](options)
    if options.json is not None:
        write_json(options.json, report)
    return 0


def _name(options: argparse.Namespace) -> str:
    return Path(options.model).name


def _device(options: argparse.Namespace):
    import torch

    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {options.device} cannot be used: {error}") from None
    return device


def _train(options: argparse.Namespace) -> int:
    from cvg_kernels.scenes.train import Recipe, train

    device = _device(options)
    recipe = Recipe(**{name: getattr(options, name) for name in vars(Recipe())})
    processes = options.processes if device.type == "cpu" else 1
    made = train(options.output, recipe, device=device, processes=processes, network=options.network)
    print(made)
    return 0


def _gate(options: argparse.Namespace) -> dict:
    from rich.progress import Progress

    from cvg_kernels.scenes.gate import failures, presence, print_failures, print_presence, prompts_of_things
    from cvg_kernels.scenes.pipeline import load_pipeline

    if options.seeds < 2:
        raise ArgumentError(f"--seeds must be at least 2, got {options.seeds}")
    pipe = load_pipeline(options.model)
    prompts = prompts_of_things(options.prompts, options.seed)
    with Progress(transient=True) as bar:
        task = bar.add_task("clips", total=options.prompts * options.seeds)
        verdicts, table = presence(
            pipe,
            prompts,
            seeds=options.seeds,
            seed=options.seed,
            steps=options.steps,
            progress=lambda done: bar.update(task, completed=done),
        )
    report = {
        "model": _name(options),
        "prompts": options.prompts,
        "seeds": options.seeds,
        "seed": options.seed,
        "failures": failures(verdicts),
        "presence": table,
    }
    print_failures(report["failures"])
    print_presence(table)
    return report


def _eval(options: argparse.Namespace) -> dict:
    from rich.progress import Progress

    from cvg_kernels.guidance.methods import methods_named
    from cvg_kernels.scenes.evaluation import KINDS, evaluate, print_report
    from cvg_kernels.scenes.kept import KeptClips
    from cvg_kernels.scenes.pipeline import load_pipeline

    kinds = options.kinds.split(",") if options.kinds else list(KINDS)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or len(set(kinds)) < len(kinds):
        near = nearest(unknown[0], KINDS) if unknown else ""
        raise ArgumentError(f"--kinds must be different ones of {', '.join(KINDS)}, got {options.kinds}{near}")
    methods = methods_named(options.guidance)
    kept = KeptClips(options.clips)
    pipe = load_pipeline(options.model, _device(options))
    with Progress(transient=True) as bar:
        tasks = {name: bar.add_task(name, total=options.prompts * len(kinds)) for name in methods}
        report = evaluate(
            pipe,
            methods,
            model=_name(options),
            prompts=options.prompts,
            seed=options.seed,
            kinds=kinds,
            kept=kept,
            steps=options.steps,
            progress=lambda name, done: bar.update(tasks[name], completed=done),
        )
    print_report(report)
    return report


def _attribution(options: argparse.Namespace) -> dict:
    from rich.progress import Progress

    from cvg_kernels.scenes.attribution import MOTIONS, NOISE, attribution, draw_attribution, print_attribution
    from cvg_kernels.scenes.pipeline import load_pipeline

    pipe = load_pipeline(options.model)
    with Progress(transient=True) as bar:
        task = bar.add_task("calls", total=options.clips * len(MOTIONS) * len(NOISE))
        found = attribution(
            pipe, clips=options.clips, seed=options.seed, progress=lambda done: bar.update(task, completed=done)
        )
    print_attribution(found)
    if options.figure is not None:
        draw_attribution(found, options.figure)
    return {"model": _name(options), "clips": options.clips, "seed": options.seed} | {"attribution": found}
