"""The loop that trains one network of the shapes world: seeded, resumable, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cvg_kernels.training.checkpoint import Checkpoint
from cvg_kernels.training.log import TrainingLog


def fit(
    folder: Path,
    name: str,
    model: nn.Module,
    loss: Callable[[nn.Module, np.random.Generator], torch.Tensor],
    *,
    steps: int,
    seed: int,
    rate: float,
    rates: dict[str, float] | None = None,
    weight_decay: float = 1e-2,
    decay: float | None = None,
    rank: int = 0,
    processes: int = 1,
) -> nn.Module:
    """Trains a network with AdamW, one learning-rate cycle and gradients clipped to norm 1.

    Args:
        folder: the run's folder, with the checkpoint `<name>.safetensors` and `metrics.jsonl`.
        name: name of the stage.
        model: on its device; trained in place.
        loss: the loss of a step, from the network and the step's own source of randomness; torch's is seeded, too.
        steps: number of optimiser steps.
        seed: random seed of the run; with the name and the number of the step it decides what a step draws.
        rate: highest learning rate.
        rates: part of a parameter's name → highest learning rate of such parameters, where it differs.
        weight_decay: weight decay of AdamW.
        decay: decay of the moving average of the weights; `None`: no average.
        rank: number of this process.
        processes: how many train together, each on samples of its own; `torch.distributed` joins them already.

    Returns:
        The trained network, or its moving average.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        special = [value for part, value in (rates or {}).items() if part in key]
        groups.setdefault(special[0] if special else rate, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters} for parameters in groups.values()], weight_decay=weight_decay
    )
    parts = {
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.OneCycleLR(
            optimizer, list(groups), total_steps=steps, pct_start=min(0.3, 150 / steps)
        ),
    }
    if decay is not None:
        parts["average"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    checkpoint = Checkpoint(folder / f"{name}.safetensors", **parts)
    first = checkpoint.resume()
    stage = sum(name.encode())  # stages draw apart from each other
    trained = DistributedDataParallel(model) if processes > 1 else model
    with TrainingLog(folder, name, first, steps, silent=rank > 0) as log:
        for step in range(first, steps):
            torch.manual_seed((seed * 1_000_003 + step) * 8192 + stage + (rank << 48))
            value = loss(trained, np.random.default_rng((seed, stage, step, rank)))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            parts["schedule"].step()
            if decay is not None:
                parts["average"].update_parameters(model)
            log.step(value)
            if rank == 0:
                checkpoint.save_sometimes(step + 1)
    if rank == 0:
        checkpoint.save(steps)
    return model if decay is None else parts["average"].module
