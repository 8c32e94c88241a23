"""`cvg-kernels cvg`: train a composition classifier on one of the two worlds."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from cvg_kernels.cli.arguments import path
from cvg_kernels.cli.defaults import defaults_of
from cvg_kernels.errors import ArgumentError
from cvg_kernels.model_folders import check_model, options_for, reason_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cvg train`."""
    shapes, scenes = (defaults_of(f"cvg_kernels.{world}.classifier_clips", "Clips") for world in ("shapes", "scenes"))
    recipe = defaults_of("cvg_kernels.training.train", "Recipe")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser(
        "train",
        help="make features, train and test the classifier; run again to resume",
        description="Inverts clips of the world and generates others, keeps the attention maps of the first "
        "steps in OUTPUT/features, and trains the classifier in OUTPUT/classifier on them. Run again, it resumes "
        "where it stopped. Several processes or devices: accelerate launch -m cvg_kernels cvg train …",
    )
    train.add_argument("--output", type=path, default=Path("cvg-run"), help="the run's folder")
    train.add_argument("--world", choices=("shapes", "scenes"), default="shapes", help="whose pipeline and clips")
    train.add_argument(
        "--question", help=f"of scenes: what it learns to tell, number or relation; default: {scenes['question']}"
    )
    train.add_argument("--features", type=path, help="the features folder of another run; made if not given")
    train.add_argument("--model", type=path, help="a pipeline folder of that world; default: that in the sources")
    train.add_argument("--clips", type=int, help=f"real clips to invert; of shapes, default: {shapes['real']}")
    for name, meaning in (("generated", "clips to generate"), ("read_steps", "denoising steps read")):
        default = f"{shapes[name]}, of scenes {scenes[name]}" if shapes[name] != scenes[name] else f"{shapes[name]}"
        told = f"{meaning}; default: {default}"
        train.add_argument(f"--{name.replace('_', '-')}", type=int, help=told)
    train.add_argument("--noise", action="store_true", help="of shapes: noise real clips, do not invert them")
    train.add_argument("--no-dual", action="store_true", help="of shapes: train without the wrong prompts")
    train.add_argument(
        "--vision-language",
        help="a local folder or hub id of a CLIP or SigLIP model: the frozen backbone; default: a small 3-D network",
    )
    train.add_argument("--steps", type=int, default=recipe["steps"], help="of the optimiser")
    train.add_argument("--batch", type=int, default=recipe["batch"], help="entities a step")
    train.add_argument("--seed", type=int, default=recipe["seed"], help="seed of everything that is drawn")
    train.add_argument("--cpu", action="store_true", help="run on the CPU even if there is a GPU")


def run(options: argparse.Namespace) -> int:
    """Trains and prints the test figures."""
    for name, least in (("clips", 0), ("generated", 0), ("read_steps", 1), ("steps", 1), ("batch", 1)):
        given = getattr(options, name)
        if given is not None and given < least:
            raise ArgumentError(f"--{name.replace('_', '-')} must be at least {least}, got {given}")
    others = ("question",) if options.world == "shapes" else ("clips", "noise", "no_dual")
    for name in others:
        if getattr(options, name) not in (None, False):
            raise ArgumentError(f"--{name.replace('_', '-')} is not for --world {options.world}")
    if options.output.exists() and not options.output.is_dir():
        raise ArgumentError(f"--output must be a folder, got the file {options.output}")

    from accelerate import Accelerator
    from rich.progress import Progress

    from cvg_kernels.training.features import make_features
    from cvg_kernels.training.train import Recipe, train_classifier

    accelerator = Accelerator(cpu=options.cpu)
    world = import_module(f"cvg_kernels.{options.world}.classifier_clips")
    told = {"real": options.clips, "generated": options.generated, "read_steps": options.read_steps}
    told |= {"question": options.question, "noise": options.noise or None, "seed": options.seed}
    clips = world.Clips(**{name: value for name, value in told.items() if value is not None})
    recipe = Recipe(
        steps=options.steps,
        batch=options.batch,
        dual=not options.no_dual,
        read_steps=clips.read_steps,
        seed=options.seed,
    )
    if options.features is None:
        with Progress(disable=not accelerator.is_main_process) as bar:
            own = clips.ends[-1] // accelerator.num_processes
            task = bar.add_task("features", total=own)
            load = import_module(f"cvg_kernels.{options.world}.pipeline").load_pipeline
            make_features(
                options.output / "features",
                load(options.model, accelerator.device),
                clips,
                rank=accelerator.process_index,
                processes=accelerator.num_processes,
                progress=lambda done: bar.advance(task, done),
            )
        accelerator.wait_for_everyone()
    classifier = train_classifier(
        options.output, recipe, accelerator, features=options.features, **_backbone(options.vision_language)
    )
    if accelerator.is_main_process:
        print(json.dumps(classifier.report, indent=2))
        print(options.output / "classifier")
    return 0


def _backbone(vision_language: str | None) -> dict[str, Any]:
    """The arguments of `CompositionClassifier` that choose its backbone."""
    if vision_language is None:
        return {}
    from transformers import AutoModel, AutoTokenizer

    options = options_for(vision_language, "--vision-language")
    try:
        if Path(vision_language).is_dir():
            check_model(Path(vision_language))
        model = AutoModel.from_pretrained(vision_language, **options)
        del options["use_safetensors"]
        tokenizer = AutoTokenizer.from_pretrained(vision_language, **options)
    except Exception as error:  # what a folder or the hub holds may be anything
        reason = reason_of(error, vision_language)
        raise ArgumentError(f"--vision-language {vision_language!r} cannot be loaded: {reason}") from error
    return {"backbone": {"kind": "vision-language"}, "vision_language": (model, tokenizer)}
