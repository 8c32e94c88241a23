"""The check of gradients by finite differences passes right ones only,
in any precision and at any size of the loss.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.differences import SHARPEST, assert_gradient, slope_of


def network(dtype: torch.dtype, size: float):
    """A loss of a small network, a constant beside a variable part of `size`, a point and its gradient there."""
    first, second = torch.randn(60, 40, dtype=dtype) / 6, torch.randn(40, dtype=dtype)

    def loss(z):
        return 1 + size * ((z @ first).tanh() @ second).sin().sum()

    at = torch.randn(3, 60, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(at), at)
    return loss, at, gradient


@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_right_gradients_pass(size):
    assert_gradient(*network(torch.float64, size))


@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.parametrize("factor", [0.95, 1.05, -1.0, 1e-3, 1e3])
def test_gradients_of_a_wrong_size_fail(size, factor):
    loss, at, gradient = network(torch.float64, size)
    with pytest.raises(AssertionError, match="along itself the gradient says"):
        assert_gradient(loss, at, factor * gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_missing_part_fails(dtype):
    """Along what is left of it, the gradient is right; a random direction may lie across what is missing, eight do
    not.
    """
    loss, at, gradient = network(dtype, 1.0)
    gradient[1] = 0
    with pytest.raises(AssertionError, match=r"along a random direction"):
        for _ in range(8):
            assert_gradient(loss, at, gradient)


@pytest.mark.parametrize("gradient", [0.0, torch.nan])
def test_no_gradient_fails(gradient):
    loss, at, wrong = network(torch.float64, 1.0)
    with pytest.raises(AssertionError, match="0 or not finite"):
        assert_gradient(loss, at, torch.full_like(wrong, gradient))


@pytest.mark.parametrize("factor", [1.0, 0.95])
def test_what_roundings_hide_is_no_pass(factor):
    """A loss that moves by about one rounding of float32 tells nothing, whatever is claimed."""
    loss, at, gradient = network(torch.float32, 1e-7)
    with pytest.raises(AssertionError, match="differences cannot tell"):
        assert_gradient(loss, at, factor * gradient)


def test_a_kink_narrows_the_width():
    """Where the loss turns a hundredth away, wider differences are wrong, and known to be."""

    def turned(distance):
        return 1 + 2 * math.exp(distance) + 50 * max(0.0, distance - 0.01)

    found = slope_of(turned, torch.finfo(torch.float64).eps, 1.0, 2.0)
    assert found.budget <= SHARPEST * 2 and abs(found.value - 2) <= found.budget


def test_budgets_hold():
    """Over many smooth losses in both precisions, the true slope lies within the budget."""
    for dtype in (torch.float32, torch.float64) * 20:
        loss, at, gradient = network(dtype, 1.0)
        direction = gradient / gradient.norm()

        def along(distance, loss=loss, at=at, direction=direction):
            with torch.no_grad():
                return loss(at + distance * direction).item()

        exact = gradient.double().norm().item()
        found = slope_of(along, torch.finfo(dtype).eps, at.detach().norm().item(), exact)
        assert abs(found.value - exact) <= found.budget
