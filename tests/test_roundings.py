"""Budgets from roundings let other orders of adding pass, and no more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.roundings import assert_equal_but_for_roundings, moves, rounded_weights


def network():
    """A network, what it makes, and the same with its sums in another order."""
    layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(16, 64)

    def run(order=slice(None), factor=1.0):
        first, _, last = layers
        hidden = layers[1](x[:, order] @ first.weight[:, order].T + first.bias)
        out = factor * (hidden @ last.weight.T + last.bias)
        return [out.detach(), out.square().mean().detach(), out.abs().mean().detach()]

    return layers, run


def test_another_order_passes():
    layers, run = network()
    other = run(torch.randperm(64))
    assert_equal_but_for_roundings(other, run(), moves(run, [layers]))


def test_what_is_larger_than_roundings_fails():
    layers, run = network()
    with pytest.raises(AssertionError, match="allowed are"):
        assert_equal_but_for_roundings(run(factor=1 + 1e-4), run(), moves(run, [layers]))


def test_weights_are_themselves_again():
    layer = nn.Linear(5, 4)
    before = layer.weight.clone()
    with rounded_weights([layer, layer]):
        assert (layer.weight != before).all() and torch.allclose(layer.weight, before)
    assert torch.equal(layer.weight, before)
