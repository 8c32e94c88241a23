"""The training loop of the composition classifier."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cvg_kernels.composition.classifier import CompositionClassifier
from cvg_kernels.composition.features import Selection
from cvg_kernels.errors import ArgumentError
from cvg_kernels.training.checkpoint import Checkpoint
from cvg_kernels.training.dataset import Entities, split
from cvg_kernels.training.log import TrainingLog
from cvg_kernels.training.score import score
from cvg_kernels.training.store import WRONG_PROMPT, Examples, load, write_or_check_settings
from cvg_kernels.training.symmetry import mirrored, permutations
from cvg_kernels.writing import write_json

_STEPS_AT_ONCE = 2  # denoising steps that an optimiser step looks at, drawn from those read


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained. The defaults made the one that ships.

    Attributes:
        steps: number of steps of the optimiser.
        batch: entities a step, of all processes together.
        rate: highest learning rate of AdamW's one cycle.
        decay: weight decay.
        dual: use the inversions with the wrong prompt too.
        mirror: turn and mirror examples at random (see `symmetry`); needs a square grid.
        read_steps: how many of the steps in the features are used.
        seed: random seed of initialisation and order.
    """

    steps: int = 1000
    batch: int = 64
    rate: float = 1e-3
    decay: float = 0.05
    dual: bool = True
    mirror: bool = True
    read_steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "read_steps"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")


def new_classifier(index: dict[str, Any], entities: Entities, **options: Any) -> CompositionClassifier:
    """An untrained classifier for the features of a folder, with their statistics.

    Args:
        index: index of the folder.
        entities: to take the statistics from.
        **options: options of `CompositionClassifier`.
    """
    selection = Selection(tuple(index["layers"]), tuple(index["heads"]), tuple(index["grid"]))
    classifier = CompositionClassifier(index["labels"], selection, index["timesteps"], index["fingerprint"], **options)
    some = torch.linspace(0, len(entities) - 1, min(len(entities), 512)).long()
    for step in range(len(index["timesteps"])):
        maps, _ = entities.take(some, torch.tensor([step]))
        classifier.aggregator.fit_statistics(step, maps[:, 0])
    return classifier


def train_classifier(
    folder: Path,
    recipe: Recipe,
    accelerator: Any,
    *,
    features: Path | None = None,
    vision_language: Any = None,
    **options: Any,
) -> CompositionClassifier:
    """Trains on features and writes `folder/classifier`; a cut-off run goes on.

    Loss: the mean over two denoising steps, drawn at random, of −log C(φ(z_t, p))_y. With dual inversion the sum of
    both prompts' terms of the paper is had in expectation: both inversions of a clip are examples with the same true
    label. What is drawn at an optimiser step depends on seed and step alone, and each process takes its share of it:
    any number of processes computes the same, but for dropout.

    Args:
        folder: the run's.
        recipe: how.
        accelerator: accelerator of the accelerate library.
        features: where they are; `None` takes `folder/features`.
        vision_language: see `CompositionClassifier`.
        **options: options of `CompositionClassifier`.

    Returns:
        The trained classifier, on the CPU in eval mode, its test figures in `report`.

    Raises:
        ArgumentError: for a folder without features or with a run of another recipe, or a batch that cannot be shared
            out.
    """
    index, everything = _load(folder / "features" if features is None else features, recipe)
    examples = everything
    if not recipe.dual:
        examples = examples.where(examples.source != WRONG_PROMPT)
    processes, rank = accelerator.num_processes, accelerator.process_index
    if recipe.batch % processes:
        raise ArgumentError(f"batch must be a multiple of the {processes} processes, got {recipe.batch}")
    if recipe.mirror and index["grid"][1] != index["grid"][2]:
        raise ArgumentError(f"mirror must be False unless the grid is square, got {index['grid']}")
    if accelerator.is_main_process:
        write_or_check_settings(folder / "recipe.json", asdict(recipe) | options)
    training = Entities.of(split(examples)[0])
    torch.manual_seed(recipe.seed)
    classifier = new_classifier(index, training, vision_language=vision_language, **options)
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.steps)
    checkpoint = Checkpoint(
        folder / "classifier.safetensors", model=classifier, optimizer=optimizer, schedule=schedule
    )
    first = checkpoint.resume()
    logits_of = accelerator.prepare(_StepLogits(classifier))
    device = accelerator.device
    timesteps = torch.tensor(index["timesteps"], device=device)

    mirrors = permutations(index["labels"])
    with TrainingLog(folder, "classifier", first, recipe.steps, silent=rank > 0) as log:
        classifier.train()
        for step in range(first, recipe.steps):
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
            drawn = torch.randint(len(training), (recipe.batch,), generator=generator)
            steps = torch.randperm(len(timesteps), generator=generator)[:_STEPS_AT_ONCE]
            maps, labels = training.take(drawn[rank::processes], steps)
            if recipe.mirror:
                which = torch.randint(len(mirrors), (recipe.batch,), generator=generator)
                maps, labels = mirrored(maps, labels, mirrors, which[rank::processes])
            torch.manual_seed((recipe.seed * 1_000_003 + step) * 64 + rank)  # of dropout
            logits = logits_of(maps.to(device), timesteps[steps.to(device)])  # [n, T, labels]
            loss = cross_entropy(logits.flatten(0, 1), labels.to(device).repeat_interleave(len(steps)))
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            log.step(accelerator.reduce(loss.detach(), "mean"))
            if accelerator.is_main_process:
                checkpoint.save_sometimes(step + 1)

    classifier = classifier.to("cpu").eval()
    if accelerator.is_main_process:
        checkpoint.save(recipe.steps)
        classifier.report = {"recipe": asdict(recipe), **score(classifier, split(everything)[1])}
        classifier.save(folder / "classifier")
        write_json(folder / "report.json", classifier.report)
    accelerator.wait_for_everyone()
    return classifier


def _load(folder: Path, recipe: Recipe) -> tuple[dict[str, Any], Examples]:
    """The features of a run, in the steps that the recipe reads."""
    index, examples = load(folder)
    if recipe.read_steps > len(index["timesteps"]):
        raise ArgumentError(
            f"read_steps must be at most the {len(index['timesteps'])} of the features, got {recipe.read_steps}"
        )
    index["timesteps"] = index["timesteps"][: recipe.read_steps]
    examples.maps = examples.maps[:, : recipe.read_steps]
    return index, examples


class _StepLogits(nn.Module):
    """The classifier with `step_logits` as its forward, which is what data parallelism wraps."""

    def __init__(self, classifier: CompositionClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, maps: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.classifier.step_logits(maps, timesteps)
