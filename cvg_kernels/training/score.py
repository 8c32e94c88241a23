"""What a trained classifier can read, and whether it reads the prompt instead."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from cvg_kernels.composition.classifier import CompositionClassifier
from cvg_kernels.training.dataset import Entities
from cvg_kernels.training.store import GENERATED, RIGHT_PROMPT, WRONG_PROMPT, Examples


@torch.no_grad()
def score(classifier: CompositionClassifier, examples: Examples) -> dict[str, Any]:
    """Accuracy on test examples by source, and the leakage probe.

    Returns:
        Per source (`right_prompt`, `wrong_prompt`, `generated`): number of entities, accuracy of the mean over steps
        and of each step. `wrong_prompt` is the leakage probe: accuracy where the prompt lies, and `says_the_lie`, how
        often the classifier says what the prompt said. `generated_lies` is the same for generated clips that show a
        motion other than that asked for.
    """
    entities = Entities.of(examples)
    timesteps = torch.tensor(classifier.timesteps)
    logits = [
        classifier.step_logits(entities.take(part)[0], timesteps) for part in torch.arange(len(entities)).split(64)
    ]
    said = torch.cat(logits).softmax(-1).log()  # [N, T, labels]
    example, entity = entities.places.unbind(1)
    label = examples.label[example, entity].long()
    asked = examples.asked[example, entity].long()
    source = examples.source[example]
    motion = torch.isin(label, asked)  # nobody asks for nothing
    groups = {
        "right_prompt": source == RIGHT_PROMPT,
        "wrong_prompt": source == WRONG_PROMPT,
        "generated": source == GENERATED,
        "generated_lies": (source == GENERATED) & motion & (label != asked),
    }
    together = said.mean(1).argmax(1)
    report: dict[str, Any] = {}
    for name, mask in groups.items():
        if not mask.any():
            continue
        report[name] = {
            "entities": int(mask.sum()),
            "accuracy": _mean(together[mask] == label[mask]),
            "accuracy_by_step": [_mean(said[mask, step].argmax(1) == label[mask]) for step in range(said.shape[1])],
            "loss_by_step": [
                round(float(cross_entropy(said[mask, step], label[mask])), 4) for step in range(said.shape[1])
            ],
        }
        if name.startswith(("wrong", "generated_lies")):
            report[name]["says_the_lie"] = _mean(together[mask] == asked[mask])
    return report


def _mean(values: torch.Tensor) -> float:
    return round(float(values.float().mean()), 4)
