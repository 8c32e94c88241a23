"""Error budgets taken from what PyTorch's own path of the same precision makes of the same input."""

from __future__ import annotations

import torch


def relative_error(actual: torch.Tensor, exact: torch.Tensor, size: float = 0.0) -> float:
    """Largest error relative to the largest value of the exact result; NaN is an error.

    Where terms cancel to a smaller result, or to 0, their `size` takes the place of the result's.
    """
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    assert torch.isfinite(actual).all(), "not finite"
    if exact.numel() == 0:
        return 0.0
    scale = max(exact.abs().max().item(), size) or 1.0
    return (actual.double() - exact).abs().max().item() / scale


def budget(
    actual: torch.Tensor,
    stock: torch.Tensor,
    exact: torch.Tensor,
    factor: float = 1.5,
    depth: int = 1,
    size: float = 0.0,
    exponent: float = 0.0,
    sums: torch.dtype = torch.float32,
) -> float:
    """The relative error that a result may have: `factor` times that of PyTorch's own result, and what none can avoid.

    On a few numbers the stock path can be exact by luck, so what no float32 kernel can avoid is allowed on top: one
    rounding of the result, the random walk √depth · eps of a sum of `depth` terms in the type of `sums`, and for
    probabilities made as exp(score − logsumexp), with numbers up to `exponent`, the half ulp of either. `size` is as
    for `relative_error`.
    """
    unavoidable = torch.finfo(actual.dtype).eps
    unavoidable += (depth**0.5 + exponent) * torch.finfo(sums).eps
    return factor * relative_error(stock, exact, size) + unavoidable


def assert_as_exact_as(
    actual: torch.Tensor,
    stock: torch.Tensor,
    exact: torch.Tensor,
    factor: float = 1.5,
    depth: int = 1,
    size: float = 0.0,
    exponent: float = 0.0,
) -> None:
    """Asserts that the error is within the `budget`."""
    allowed = budget(actual, stock, exact, factor, depth, size, exponent)
    found = relative_error(actual, exact, size)
    assert found <= allowed, f"error {found:.3g}, allowed {allowed:.3g}"


def assert_sum_as_exact_as(
    actual: torch.Tensor, stock: torch.Tensor, exact: torch.Tensor, factor: float = 2.0
) -> None:
    """Asserts that a sum is right though its terms cancel, as those of the gradient of one number for all places do.

    Where they cancel, neither the sum nor what PyTorch's own sum is off by, one number that may be right by luck, says
    how exact it can be: the terms do. Each may be `factor` times as far off as PyTorch's own, and all to one side;
    adding rounds each once more, and the sum as a random walk. Of several sums of few terms each, PyTorch's may be
    right by luck too: the one with the largest errors stands for all. The terms are the gradients of copies of the
    number, one for each place where it is used.

    Args:
        actual: the sum.
        stock: its terms by PyTorch in float32, `[..., *actual.shape]`.
        exact: the same in float64.
        factor: how much farther off than PyTorch's a term may be.
    """
    assert stock.shape == exact.shape and actual.shape == exact.shape[exact.ndim - actual.ndim :]
    assert torch.isfinite(actual).all(), "not finite"
    stock, exact = (terms.double().reshape(-1, *actual.shape) for terms in (stock.detach(), exact.detach()))
    total = exact.sum(0)
    off = (stock - exact).abs().sum(0).max()
    adding = exact.abs().sum(0) + len(exact) ** 0.5 * total.abs()
    allowed = factor * off + torch.finfo(torch.float32).eps * adding
    allowed += torch.finfo(actual.dtype).eps * total.abs()
    found = (actual.detach().double() - total).abs()
    worst = (found - allowed).argmax()
    assert (found <= allowed).all(), (
        f"error {found.flatten()[worst]:.3g}, allowed {allowed.flatten()[worst]:.3g}, of {total.flatten()[worst]:.6g}"
    )


def assert_maps_exact(maps: torch.Tensor, exact: torch.Tensor, row_peak: torch.Tensor, bound: float):
    """Asserts that maps are right to `bound`, relative to the largest probability of their row.

    Args:
        maps: `[..., K, N]`.
        exact: the same in float64.
        row_peak: `[..., N]`, largest probability of each row (for a head mean: the mean of the heads').
        bound: the relative error allowed.
    """
    assert maps.shape == exact.shape, (maps.shape, exact.shape)
    assert torch.isfinite(maps).all(), "not finite"
    error = ((maps.double() - exact).abs() / row_peak.clamp_min(1e-30)[..., None, :]).max()
    assert error <= bound, f"error {error.item():.3g} of the row's largest, allowed {bound:.3g}"
