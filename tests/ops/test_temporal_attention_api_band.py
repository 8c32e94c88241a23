"""A band of two numbers is made once, and never where a mode or transform of torch owns the tensors of a call."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cvg_kernels as cvg
from cvg_kernels.ops import _validate_temporal as validate


@pytest.fixture(autouse=True)
def _nothing_kept():
    validate._kept_band.cache_clear()


def band_of(query, sigma=2.0, strength=0.5):
    return validate.added_logits(query, sigma, strength, None)


def test_two_numbers_make_one_band():
    query = torch.randn(3, 2, 6, 8)
    first = band_of(query)
    assert band_of(query.half()) is first and band_of(torch.randn(1, 1, 6, 4), 2, 0.5) is first
    for other in (band_of(query.double()), band_of(query[:, :, :5]), band_of(query, 2.5)):
        assert other is not first
    at = torch.arange(6.0)
    wanted = 0.5 * (-((at[:, None] - at) ** 2) / 8).exp()
    torch.testing.assert_close(first, wanted)
    sigma = torch.tensor(2.0, requires_grad=True)
    assert band_of(query, sigma).requires_grad and not first.requires_grad


def test_a_band_of_inference_mode_serves_a_gradient():
    query = torch.randn(3, 2, 6, 8)
    with torch.inference_mode():
        cvg.temporal_attention(query, query, query, sigma=2.0)
    leaf = query.clone().requires_grad_()
    with cvg.trace_backends() as ran:
        cvg.temporal_attention(leaf, leaf, leaf, sigma=2.0).out.square().sum().backward()
    assert ran[0][0] == "temporal_attention" and leaf.grad.abs().sum() > 0
    assert validate._kept_band.cache_info().hits == 1


def test_fake_and_transformed_tensors_are_not_kept():
    query = torch.randn(3, 2, 6, 8)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(query)
        assert type(band_of(fake)) is not torch.Tensor
    torch.func.grad(lambda q: (q.sum() * band_of(q)).sum())(query)
    torch.vmap(lambda q: q.sum() * band_of(q))(query[None])
    kept = band_of(query)
    assert type(kept) is torch.Tensor and kept.sum().item() > 0
    compiled = torch.compile(lambda q: band_of(q) * q.sum(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query), kept * query.sum())
    assert band_of(query) is kept
