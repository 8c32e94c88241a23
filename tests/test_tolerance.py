"""The budgets let roundings pass, and nothing that is larger."""

from __future__ import annotations

import pytest
import torch

from tests.tolerance import assert_sum_as_exact_as


def rounded(exact: torch.Tensor) -> torch.Tensor:
    """Terms as float32 has them after a few operations."""
    eps = torch.finfo(torch.float32).eps
    return (exact * (1 + eps * torch.randn_like(exact))).float()


@pytest.mark.parametrize("shape", [(12, 17, 17), (3, 17, 17), (40,)])
@pytest.mark.parametrize("cancel", [False, True])
def test_roundings_of_a_sum_pass(shape, cancel):
    """Of other roundings than those of the stock terms, added in another order, whatever the terms cancel to."""
    for ndim in range(len(shape)):
        axes = tuple(range(len(shape) - ndim))
        exact = torch.randn(shape, dtype=torch.float64)
        if cancel:
            exact -= exact.mean(axes, keepdim=True)
        other = rounded(exact.flip(0)).sum(axes)
        assert_sum_as_exact_as(other, rounded(exact), exact)


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_one_per_cent_of_a_sum_fails(factor):
    """Of one that does not cancel to less than its terms do by luck."""
    exact = torch.randn(12, 17, 17, dtype=torch.float64) + 0.1
    with pytest.raises(AssertionError, match="allowed"):
        assert_sum_as_exact_as((factor * exact.sum()).float(), rounded(exact), exact)


def test_a_missing_term_fails():
    """Also the smallest of a hundred."""
    exact = torch.randn(100, dtype=torch.float64)
    exact = exact.sign() * exact.abs().clamp_min(0.01)
    missing = exact.abs().argmin()
    with pytest.raises(AssertionError, match="allowed"):
        assert_sum_as_exact_as((exact.sum() - exact[missing]).float(), rounded(exact), exact)


def test_what_is_not_a_number_fails():
    exact = torch.randn(5, dtype=torch.float64)
    with pytest.raises(AssertionError, match="not finite"):
        assert_sum_as_exact_as(torch.tensor(torch.nan), rounded(exact), exact)
