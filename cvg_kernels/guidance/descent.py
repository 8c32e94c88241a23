"""Gradient descent on latents within one denoising step: what all gradient-based methods share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.guidance.steps import LatentStepper
from cvg_kernels.pipeline.call import Call
from cvg_kernels.pipeline.session import Run

#: Latents → losses `[B]`, differentiable, and what else the history should say.
LossAt = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, Any]]]


def descend(
    call: Call, run: Run, loss_at: LossAt, stepper: LatentStepper, *, iterations: int, threshold: float = 0.0
) -> torch.Tensor | None:
    """Moves the latents of a step down the gradient of a loss; returns them, or `None` if no update was made.

    Every evaluation is an entry of `run.history`: run, step, timestep, iteration, loss, gradient_norm, seconds, and
    what `loss_at` adds. Tensors in it stay on the device until somebody reads them.

    Args:
        call: the conditional part of the step's first denoiser call.
        run: whose history is written.
        loss_at: the loss; what it captures must be active around this call, for the backward pass too.
        stepper: the rule of the step.
        iterations: evaluations at most.
        threshold: samples whose loss is below are left alone; once all are, the loop ends. 0 never looks, and so never
            waits for the device within the loop.

    Raises:
        ArgumentError: if a loss of the step is infinite or NaN, or cannot be differentiated.
    """
    latents, seen, updates = call.latents, [], 0
    for iteration in range(iterations):
        began = time.perf_counter()
        z = latents.detach().requires_grad_()
        try:
            losses, notes = loss_at(z)
            if not losses.requires_grad:
                raise ArgumentError(
                    "the loss has no gradient to the latents: the denoiser has layers that cannot be differentiated, "
                    "such as weights with dynamically quantised activations; quantise the weights alone"
                )
            (gradient,) = torch.autograd.grad(losses.sum(), z)
        except NotImplementedError as error:  # torch's flex attention on a CPU
            raise ArgumentError(f"the loss has no gradient to the latents: {error}") from error
        seen.append(losses.detach())
        active = seen[-1] > threshold
        run.history.append(
            {
                "run": call.sampling.number,
                "step": call.index,
                "timestep": call.timestep,
                "iteration": iteration,
                "loss": seen[-1],
                "gradient_norm": gradient.flatten(1).norm(dim=1),
                "seconds": time.perf_counter() - began,
                **notes,
            }
        )
        if threshold > 0 and not bool(active.any()):
            run.notes["below threshold"] = {"every loss was below its threshold"}
            break
        updates += 1
        moved = stepper(z.detach(), gradient)
        latents = torch.where(active.view(-1, 1, 1, 1, 1), moved, z.detach())
    if seen and not bool(torch.stack(seen).isfinite().all()):
        raise ArgumentError(
            f"the loss of step {call.index} is infinite or NaN: a smaller step_size, or a wider dtype of the model"
        )
    return latents if updates else None
