"""How a gradient becomes a step on the latents."""

from __future__ import annotations

from typing import Literal

import torch

StepRule = Literal["normalized", "adam", "sgd"]
STEP_RULES = ("normalized", "adam", "sgd")


class LatentStepper:
    """Moves latents against a gradient, in their own precision; made anew for every denoising step, as Vico's code
    does.

    Args:
        rule: `"normalized"`: z − s · ‖z‖ · g / ‖g‖ per sample, so that `size` is a share of the latents' length;
            `"sgd"`: z − s · g;  `"adam"`: Adam with learning rate s (its first step is s · sign g, nearly).
        size: s.
    """

    def __init__(self, rule: StepRule, size: float) -> None:
        self.rule = rule
        self.size = size
        self._adam: torch.optim.Adam | None = None

    def __call__(self, latents: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Returns moved latents `[B, …]`."""
        if self.rule == "sgd":
            return latents - self.size * gradient
        if self.rule == "normalized":
            length = latents.flatten(1).norm(dim=1)
            steepness = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)
            factor = self.size * length / steepness
            return latents - factor.view(-1, *[1] * (latents.ndim - 1)) * gradient
        if self._adam is None:
            self._moving = latents.clone().requires_grad_()
            self._adam = torch.optim.Adam([self._moving], lr=self.size)
        self._moving.grad = gradient
        self._adam.step()
        return self._moving.detach().clone()
