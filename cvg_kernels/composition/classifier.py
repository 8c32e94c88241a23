"""The composition classifier of CVG: maps of an entity's words → which composition the video will have."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cvg_kernels.composition.aggregator import ROLES, Aggregator
from cvg_kernels.composition.backbones import SmallVideoNet, VisionLanguage, build_backbone
from cvg_kernels.composition.features import Selection
from cvg_kernels.composition.fingerprint import difference, fingerprint
from cvg_kernels.composition.settings import read_settings
from cvg_kernels.errors import ArgumentError
from cvg_kernels.pipeline.models import denoisers_of
from cvg_kernels.pipeline.video_pipeline import VideoPipeline
from cvg_kernels.reading import check_shapes, digest, read_tensors
from cvg_kernels.writing import write_json, write_tensors

FORMAT = 2
_SETTINGS, _WEIGHTS = "classifier.json", "classifier.safetensors"


class CompositionClassifier(nn.Module):
    """C(φ(z_t, p)): attention maps of one entity at some steps → logits over composition labels.

    φ is the aggregator's volume of each step (Compositional Video Generation via Inference-Time Guidance concatenates
    them over the steps). Here the backbone looks at each step's volume by itself and the logits are averaged over the
    steps given: at a guided step only that step's maps exist and have a gradient, so every step must stand alone.

    Args:
        labels: Y, in the order of the logits.
        selection: which maps are features.
        timesteps: timesteps of the steps that training read.
        model: fingerprint of the denoiser.
        aggregator: options of `Aggregator`.
        backbone: `kind` and options of a backbone; the small 3-D network by default.
        vision_language: the pair (model, tokenizer) of a backbone that needs it.
        training: figures of the training, kept with the weights.

    Attributes:
        fingerprint: that of the denoiser.
        report: the figures of the training.

    Raises:
        ArgumentError: for labels that are fewer than two or repeat, or a backbone that cannot be made.
    """

    backbone: Any  # one of `backbones`, which have `kind` and `settings`

    def __init__(
        self,
        labels: Sequence[str],
        selection: Selection,
        timesteps: Sequence[float],
        model: dict[str, Any],
        *,
        aggregator: dict[str, Any] | None = None,
        backbone: dict[str, Any] | None = None,
        vision_language: tuple[nn.Module, Any] | None = None,
        training: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if len(set(labels)) != len(labels) or len(labels) < 2:
            raise ArgumentError(f"labels must be at least two different words, got {list(labels)}")
        self.labels = tuple(labels)
        self.selection = selection
        self.timesteps = [float(timestep) for timestep in timesteps]
        self.fingerprint = model
        self.report = training or {}
        self.aggregator = Aggregator(selection, self.timesteps, **(aggregator or {}))
        self.backbone = build_backbone(
            backbone or {"kind": SmallVideoNet.kind},
            self.labels,
            self.aggregator.settings["channels"],
            vision_language,
        )

    def step_logits(self, maps: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Logits `[N, T, labels]` of each step by itself.

        Args:
            maps: `[N, T, 2, M, F, h, w]`, as `features.with_context` makes them.
            timesteps: float `[T]`.

        Raises:
            ArgumentError: for maps of another selection.
        """
        expected = (len(timesteps), ROLES, self.selection.maps, *self.selection.grid)
        if tuple(maps.shape[1:]) != expected:
            raise ArgumentError(f"maps must be [N, {expected}], got {tuple(maps.shape)}")
        volumes = self.aggregator(maps, timesteps)
        return self.backbone(volumes.flatten(0, 1)).unflatten(0, maps.shape[:2])

    def forward(self, maps: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Logits `[N, labels]`, the mean over the steps; arguments as for `step_logits`."""
        return self.step_logits(maps, timesteps).mean(1)

    def index(self, label: str) -> int:
        """Number of a label.

        Raises:
            ArgumentError: if the classifier does not know it.
        """
        if label not in self.labels:
            raise ArgumentError(f"label must be one of {', '.join(self.labels)}, got {label!r}")
        return self.labels.index(label)

    def with_labels(self, labels: Sequence[str]) -> CompositionClassifier:
        """The same classifier for other labels, which a vision-language backbone knows by their words.

        Raises:
            ArgumentError: for a backbone without text.
        """
        if not isinstance(self.backbone, VisionLanguage):
            raise ArgumentError(
                f"labels can be changed with a {VisionLanguage.kind!r} backbone only, got {self.backbone.kind!r}"
            )
        other = CompositionClassifier(
            labels,
            self.selection,
            self.timesteps,
            self.fingerprint,
            aggregator=self.aggregator.settings,
            backbone=self._backbone_settings(),
            vision_language=(self.backbone.model, self.backbone.tokenizer),
            training=self.report,
        )
        state = self.state_dict()
        state.pop("backbone.text")  # the one thing that is of the labels
        other.load_state_dict(state, strict=False)
        return other.to(next(self.parameters()).device).train(self.training)

    def taken_to(self, pipe: VideoPipeline | nn.Module) -> CompositionClassifier:
        """The same classifier for a pipeline that it was not trained on, whose denoiser has the same attention layers.

        A denoiser that was trained on from another may attend much alike. Whether the classifier still reads its maps
        rightly is to be measured.

        Args:
            pipe: a pipeline or a denoiser.

        Raises:
            ArgumentError: if a layer is not there.
        """
        found = fingerprint(denoisers_of(pipe)[0], list(self.fingerprint["norms"]))
        missing = [name for name in self.fingerprint["norms"] if name not in found["norms"]]
        if missing:
            raise ArgumentError(f"pipe must have the layers that the classifier reads, {missing[0]!r} is not there")
        other = copy.copy(self)
        other.fingerprint = found
        return other

    def check(self, pipe: VideoPipeline | nn.Module) -> None:
        """Checks that a pipeline's denoiser is the one whose maps the classifier learnt to read.

        Args:
            pipe: a pipeline or a denoiser.

        Raises:
            ArgumentError: if it is not; says what differs.
        """
        reason = difference(self.fingerprint, denoisers_of(pipe)[0])
        if reason is not None:
            raise ArgumentError(
                f"classifier does not fit the pipeline: {reason}; train one for it with `cvg-kernels cvg train`, or "
                "use classifier.taken_to(pipe) if its denoiser was trained on from the classifier's"
            )

    def save(self, folder: str | Path) -> None:
        """Writes `classifier.json` and `classifier.safetensors`; a frozen model is not written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "format": FORMAT,
            "labels": self.labels,
            "layers": self.selection.layers,
            "heads": self.selection.heads,
            "grid": self.selection.grid,
            "timesteps": self.timesteps,
            "model": self.fingerprint,
            "aggregator": self.aggregator.settings,
            "backbone": self._backbone_settings(),
            "training": self.report,
        }
        weights = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        write_tensors(folder / _WEIGHTS, weights)
        write_json(folder / _SETTINGS, settings | {"weights": digest(folder / _WEIGHTS)})

    @classmethod
    def load(
        cls, folder: str | Path, pipe: VideoPipeline | nn.Module | None = None, *, vision_language: Any = None
    ) -> CompositionClassifier:
        """Reads what `save` wrote, in eval mode.

        Args:
            folder: with the two files.
            pipe: checked against the classifier, if given.
            vision_language: the pair (model, tokenizer), for a backbone that needs it.

        Raises:
            ArgumentError: if the folder holds no classifier, one of another format, or one of another pipeline.
        """
        folder = Path(folder)
        if not (folder / _SETTINGS).exists() or not (folder / _WEIGHTS).exists():
            raise ArgumentError(
                f"classifier must be a folder with {_SETTINGS} and {_WEIGHTS}, got {folder} without them"
            )
        settings = read_settings(folder / _SETTINGS, FORMAT)
        if settings.get("weights") not in (None, digest(folder / _WEIGHTS)):
            raise ArgumentError(
                f"{folder / _SETTINGS} is of other weights than {folder / _WEIGHTS}: save the classifier again"
            )
        selection = Selection(tuple(settings["layers"]), tuple(settings["heads"]), tuple(settings["grid"]))

        def make() -> CompositionClassifier:
            return cls(
                settings["labels"],
                selection,
                settings["timesteps"],
                settings["model"],
                aggregator=settings["aggregator"],
                backbone=settings["backbone"],
                vision_language=vision_language,
                training=settings["training"],
            )

        # The file of weights bounds what is made in memory: settings alone could ask for any size.
        with torch.device("meta"):
            aggregator = Aggregator(selection, settings["timesteps"], **settings["aggregator"])
        check_shapes(folder / _WEIGHTS, _shapes(aggregator, "aggregator."), part="aggregator.")
        if settings["backbone"]["kind"] == SmallVideoNet.kind:  # the others are of a model that is there
            with torch.device("meta"):
                check_shapes(folder / _WEIGHTS, _shapes(make()))
        classifier = make()
        weights = read_tensors(folder / _WEIGHTS, _shapes(classifier), finite=True)
        classifier.load_state_dict(weights)
        if pipe is not None:
            classifier.check(pipe)
        return classifier.eval()

    def _backbone_settings(self) -> dict[str, Any]:
        return {"kind": self.backbone.kind, **self.backbone.settings}


def _shapes(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The shapes of what a module saves."""
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}
