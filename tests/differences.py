"""Gradients against finite differences, with a width and a budget that come from the loss itself.

A central difference errs by the curvature of the loss, which grows with its width, and by the roundings of the loss,
which count for more the narrower it is. How large both are depends on the network, on the precision and, in the last
bits, on the processor. So the roundings are measured, widths are tried from narrow to wide, and what a width leaves
open is its budget. A difference that could not tell a right gradient from one that is 5 % off is a failure: a loss in
float64 always can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

#: A budget above this share of the slope says nothing; below a tenth of it, no other width is tried.
SHARPEST = 0.02
_RATIO, _WIDTHS = 4, 16  # from one width to the next, and how many are tried
_ROUNDINGS = 300  # by which the loss is to move at the narrowest


class Slope(NamedTuple):
    """A derivative along a line, by finite differences."""

    value: float
    budget: float  #: by how much it may be off
    width: float


def rounding_of(loss: Callable[[float], float], eps: float, length: float) -> float:
    """How far off the computed values of a loss are: what is left of nine neighbours without their smooth part.

    Third differences of a smooth function at a small spacing are 0; those of independent errors of size s are √20 · s
    (Moré and Wild, "Estimating computational noise"). A kink shows on one side only, so the smoother side counts;
    values that are equal by luck still have a rounding each. The spacing is one that float32 can tell, as a loss in
    float64 may come from a network with a part in float32.

    Args:
        loss: the loss at a signed distance along a line.
        eps: of the type that it is returned in.
        length: of the point where the line starts.
    """
    spacing = 4 * torch.finfo(torch.float32).eps * length
    scatter = []
    for side in (spacing, -spacing):
        values = torch.tensor([loss(side * at) for at in range(9)], dtype=torch.float64)
        scatter.append(values.diff(n=3).square().mean().div(20).sqrt().item())
    return 3 * min(scatter) + eps * abs(loss(0.0))


def slope_of(loss: Callable[[float], float], eps: float, length: float, expected: float) -> Slope:
    """The derivative of a loss at 0 along a line: Richardson's extrapolation of central differences.

    Args:
        loss: the loss at a signed distance along the line.
        eps: of the type that it is computed in.
        length: of the point where the line starts, which bounds the widths.
        expected: about what the slope is; decides where the search for a width begins, nothing else.
    """
    rounding = rounding_of(loss, eps, length)
    wanted = _ROUNDINGS * rounding / max(abs(expected), 1e-300)
    width = max(64 * eps * length, min(wanted, length / _RATIO**3))
    central: list[float] = []
    best = Slope(0.0, float("inf"), 0.0)
    for _ in range(_WIDTHS):
        central.append((loss(width) - loss(-width)) / (2 * width))
        if len(central) >= 3:
            narrow, middle, wide = central[-3:]
            value = (_RATIO**2 * narrow - middle) / (_RATIO**2 - 1)
            coarser = (_RATIO**2 * middle - wide) / (_RATIO**2 - 1)
            still = abs(value - coarser) + abs(value - narrow)  # what the last steps changed
            budget = still + 1.2 * rounding / (width / _RATIO**2)  # (16 + 1/4) / 15, above 1
            if budget < best.budget:
                best = Slope(value, budget, width)
            if best.budget <= SHARPEST / 10 * abs(best.value):
                break
        width *= _RATIO
        if width > length:
            break
    return best


def assert_gradient(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, gradient: torch.Tensor) -> None:
    """Asserts that a gradient is that of a loss, along itself and along a random direction.

    Along itself an error of size shows best; a part of it that is missing shows along the random one alone.

    Args:
        loss: a scalar function; best computed in float64.
        at: where the gradient was taken.
        gradient: what autograd says.
    """
    at, gradient = at.detach(), gradient.detach()
    assert torch.isfinite(gradient).all() and gradient.any(), "the gradient is 0 or not finite"
    for name, direction in (("itself", gradient), ("a random direction", torch.randn_like(at))):
        direction = direction / direction.norm()

        def along(distance: float, direction: torch.Tensor = direction) -> float:
            with torch.no_grad():
                return loss(at + distance * direction).item()

        with torch.no_grad():
            eps = torch.finfo(loss(at).dtype).eps
        claimed = (gradient * direction).sum().item()
        found = slope_of(along, eps, at.norm().item(), claimed)
        assert found.budget <= SHARPEST * abs(found.value), (
            f"differences cannot tell along {name}: {found}; compute the loss in float64"
        )
        assert abs(claimed - found.value) <= found.budget, (
            f"along {name} the gradient says {claimed:.6g}, differences {found}"
        )
