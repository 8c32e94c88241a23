"""CVG: the latents go where a classifier of the attention maps sees the composition that was asked for.

"Compositional Video Generation via Inference-Time Guidance". There is no public code; where the paper is silent (step
rule, step size, updates a step) the choice is ours, made on the shapes world.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from cvg_kernels.composition.classifier import CompositionClassifier
from cvg_kernels.composition.entities import Entity, entities_of
from cvg_kernels.composition.features import FeatureReader, with_context
from cvg_kernels.errors import ArgumentError, check_flag
from cvg_kernels.guidance.base import Guidance, check_count, check_number
from cvg_kernels.guidance.descent import descend
from cvg_kernels.guidance.steps import LatentStepper
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.guards import check_extra_forwards
from cvg_kernels.pipeline.layers import check_undivided
from cvg_kernels.pipeline.models import denoisers_of
from cvg_kernels.pipeline.session import Run
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.prompts.token_table import TokenTable

#: The classifier that ships, of the shapes pipeline.
SHIPPED = Path(__file__).parents[1] / "shapes" / "weights" / "classifier"


@dataclass(frozen=True)
class CVG(Guidance):
    """CVG's guidance; attach it to a pipeline as a context manager.

        with cvg.CVG().attach(pipe) as run:
            frames = pipe("a red circle moving left and a blue square moving right").frames[0]
        run.history   # cross-entropy, and the probability of each entity's label, at every evaluation

    In the first steps the conditional branch runs up to the last layer that the classifier reads, and the latents go
    down the gradient of its cross-entropy, summed over the entities e with a label y_e:

        z ← z − η_t ∇_z Σ_e −log C(φ_e(z, p))_{y_e}

    Attributes:
        classifier: what reads the maps, or the folder of one; `None` takes the one that ships, of the shapes pipeline.
        label: what each entity shall do: a label for the only entity, a label (or `None`) per entity in the order of
            the prompt, or a mapping from an entity's words to its label; `None` reads them from the prompt.
        step_size: η: a share of the latents' length if `normalize`, else the factor of the gradient.
        normalize: divide the gradient by its length, per sample.
        iterations: updates a guided step.
        backend: which implementation of the operations to use.
        stop: share of the denoising steps that are guided (paper: the first two steps are strong); steps with less
            noise than the classifier learnt to read are left alone.
        steps: old form of `stop`, a number of steps; goes with the next release.
    """

    classifier: CompositionClassifier | str | Path | None = None
    label: str | Sequence[str | None] | Mapping[str, str] | None = None
    step_size: float = 0.05
    normalize: bool = True
    iterations: int = 3
    backend: str = "auto"
    stop: float = field(default=0.1, kw_only=True)
    steps: int | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("iterations", self.iterations)
        check_number("step_size", self.step_size, 0)
        check_flag("normalize", self.normalize)
        if not isinstance(self.classifier, (CompositionClassifier, str, Path, type(None))):
            raise ArgumentError(f"classifier must be one, its folder, or None, got {self.classifier!r}")
        self._check_label()
        if self.steps is not None:
            check_count("steps", self.steps)
            warnings.warn(
                "steps is a share called stop now: of 20 steps, CVG(stop=0.1) guides two", FutureWarning, stacklevel=3
            )

    def _check_label(self) -> None:
        label = self.label
        if isinstance(label, Mapping):
            good = all(isinstance(one, str) for pair in label.items() for one in pair)
        elif isinstance(label, (list, tuple)):
            good = all(isinstance(one, (str, type(None))) for one in label)
        else:
            good = isinstance(label, (str, type(None)))
        if not good:
            raise ArgumentError(
                f"label must be a label, one (or None) per entity, {{entity: label, …}} or None, got {label!r}"
            )

    @property
    def idle(self) -> bool:
        """Whether no update is asked for."""
        return super().idle or self.iterations == 0 or self.steps == 0

    def guides(self, call: Call) -> bool:
        """Whether the step of a call is between `start` and `stop`, or among the first `steps`."""
        return super().guides(call) if self.steps is None else call.index < self.steps

    @cached_property
    def reader(self) -> CompositionClassifier:
        """The classifier, loaded; in eval mode.

        Raises:
            ArgumentError: if its folder holds none.
        """
        if isinstance(self.classifier, CompositionClassifier):
            return self.classifier.eval()
        return CompositionClassifier.load(SHIPPED if self.classifier is None else self.classifier)

    def check(self, pipe: VideoPipeline) -> None:
        """Checks that the classifier was trained on maps of this pipeline.

        Raises:
            ArgumentError: if not.
        """
        for denoiser in denoisers_of(pipe):
            check_extra_forwards(denoiser)
            check_undivided(denoiser)
        self.reader.check(pipe)

    def before_step(self, call: Call, run: Run) -> torch.Tensor | None:
        """Moves the latents of one denoising step; see `Guidance`."""
        if self.iterations == 0 or not self._readable(call):
            return None
        classifier = self.reader.to(call.latents.device)
        entities = [self.entities(prompt) for prompt in call.prompts]
        spans = call.find([[entity.phrase for entity in each] for each in entities])
        table = TokenTable.of(spans)
        stepper = LatentStepper("normalized" if self.normalize else "sgd", self.step_size)
        reader = FeatureReader(call.denoiser, classifier.selection, table, self.backend)

        def loss_at(z: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            maps = reader.read(lambda: call.denoise(z))
            losses, logits = self.losses(maps, entities, call.timestep)
            return losses, {
                "probabilities": logits.detach().softmax(-1),  # [B, E, labels]
                "scores": self._scores(entities, logits),
            }

        with reader, _frozen(classifier):
            return descend(call, run, loss_at, stepper, iterations=self.iterations)

    def losses(
        self, maps: torch.Tensor, entities: Sequence[Sequence[Entity]], timestep: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of each sample, differentiable, and the logits behind it.

        Args:
            maps: `[B, E, M, F, h, w]`, as `FeatureReader` reads them.
            entities: per sample; those without a label count nothing.
            timestep: timestep that the maps belong to.

        Returns:
            `[B]` and `[B, E, labels]`.
        """
        classifier = self.reader
        batch, count = maps.shape[:2]
        dtype = next(classifier.parameters()).dtype
        timesteps = torch.tensor([timestep], dtype=dtype, device=maps.device)
        pairs = with_context(maps.to(dtype)).flatten(0, 1)[:, None]  # [B·E, T=1, 2, M, F, h, w]
        logits = classifier(pairs, timesteps).unflatten(0, (batch, count))
        ignore = -100  # what cross_entropy leaves out
        wanted = torch.full((batch, count), ignore, device=maps.device)
        for sample, each in enumerate(entities):
            for number, entity in enumerate(each):
                if entity.label is not None:
                    wanted[sample, number] = classifier.index(entity.label)
        losses = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=ignore, reduction="none")
        return losses.unflatten(0, (batch, count)).sum(1), logits

    def entities(self, prompt: str) -> list[Entity]:
        """The entities of a prompt with what each shall do.

        Raises:
            ArgumentError: if nothing says so, or what was given does not fit the prompt.
        """
        found = entities_of(prompt, self.reader.labels)
        names = [entity.name for entity in found]
        if isinstance(self.label, Mapping):
            unknown = set(self.label) - set(names)
            if unknown:
                raise ArgumentError(
                    f"label must name entities of the prompt ({', '.join(map(repr, names))}), got {sorted(unknown)}"
                )
            labels = [self.label.get(entity.name, entity.label) for entity in found]
        elif self.label is not None:
            labels = [self.label] if isinstance(self.label, str) else list(self.label)
            if len(labels) != len(found):
                raise ArgumentError(
                    f"label must have one entry per entity ({', '.join(map(repr, names))}), got {self.label!r}"
                )
        else:
            labels = [entity.label for entity in found]
        if all(label is None for label in labels):
            raise ArgumentError(
                f"label must be given: the prompt {prompt!r} says none of {', '.join(self.reader.labels)} of "
                f"{', '.join(map(repr, names))}"
            )
        for label in labels:
            if label is not None:
                self.reader.index(label)
        return [Entity(entity.phrase, label) for entity, label in zip(found, labels, strict=True)]

    def _scores(self, entities: Sequence[Sequence[Entity]], logits: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Per sample, the probability of each entity's label; tensors stay on the device until somebody reads them."""
        probabilities = logits.detach().softmax(-1)
        return [
            {
                entity.name: row[self.reader.index(entity.label)]
                for entity, row in zip(each, rows, strict=False)
                if entity.label is not None
            }
            for each, rows in zip(entities, probabilities, strict=True)
        ]

    def _readable(self, call: Call) -> bool:
        """Whether a step has about as much noise as those of the training.

        Raises:
            ArgumentError: if not even the first step has.
        """
        trained = sorted(self.reader.timesteps)
        slack = 25.0 + (trained[-1] - trained[0]) / len(trained)
        readable = trained[0] - slack <= call.timestep <= trained[-1] + slack
        if not readable and call.index == 0:
            raise ArgumentError(
                f"classifier must be one for the first step's timestep {call.timestep:g}; this one learnt to read "
                f"timesteps {trained[0]:g} to {trained[-1]:g}"
            )
        return readable


@contextmanager
def _frozen(classifier: CompositionClassifier) -> Iterator[None]:
    """Keeps a classifier's parameters out of the graph: only the latents' gradient is wanted."""
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
