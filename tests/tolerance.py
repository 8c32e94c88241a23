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


def assert_as_exact_as(
    actual: torch.Tensor,
    stock: torch.Tensor,
    exact: torch.Tensor,
    factor: float = 1.5,
    depth: int = 1,
    size: float = 0.0,
    exponent: float = 0.0,
) -> None:
    """Asserts that the error is at most `factor` times that of PyTorch's own result.

    On a few numbers the stock path can be exact by luck, so what no float32 kernel can avoid is allowed on top: one
    rounding of the result, the random walk √depth · eps of a sum of `depth` float32 terms, and for probabilities made
    as exp(score − logsumexp), with numbers up to `exponent`, the half ulp of either. `size` is as for `relative_error`.
    """
    unavoidable = torch.finfo(actual.dtype).eps
    unavoidable += (depth**0.5 + exponent) * torch.finfo(torch.float32).eps
    allowed = factor * relative_error(stock, exact, size) + unavoidable
    found = relative_error(actual, exact, size)
    assert found <= allowed, f"error {found:.3g}, allowed {allowed:.3g}"


def assert_maps_exact(
    maps: torch.Tensor, exact: torch.Tensor, row_peak: torch.Tensor, bound: float
):
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
