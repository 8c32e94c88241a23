"""token_peaks against a plain convolution, and on volumes too thin for one."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv3d, pad

import cvg_kernels as cvg
from cvg_kernels.reference import token_peaks as reference
from tests.ops.backends import backends, device_of
from tests.tolerance import assert_as_exact_as


def by_convolution(flow, sharpness, sigma):
    """The same by a 3×3×3 kernel and reflection padding, as Attend-and-Excite builds it."""
    taps = torch.exp(-((torch.arange(3, dtype=flow.dtype) - 1) / (2 * sigma)).square())
    kernel = taps[:, None, None] * taps[None, :, None] * taps
    share = (sharpness * flow).softmax(1).flatten(0, 1)[:, None]
    smooth = conv3d(pad(share, (1,) * 6, mode="reflect"), (kernel / kernel.sum())[None, None])
    return smooth.flatten(1).amax(1).view(flow.shape[:2])


@pytest.mark.parametrize("shape", [(2, 5, 4, 3, 6), (1, 2, 2, 2, 2), (1, 8, 16, 10, 16)])
@pytest.mark.parametrize("sharpness, sigma", [(100.0, 0.5), (3.0, 1.2)])
def test_against_a_convolution(shape, sharpness, sigma):
    flow = torch.rand(shape, dtype=torch.float64)
    peaks = cvg.token_peaks(flow, sharpness=sharpness, sigma=sigma)
    torch.testing.assert_close(peaks, by_convolution(flow, sharpness, sigma))


@pytest.mark.parametrize("shape", [(1, 3, 1, 1, 1), (2, 3, 1, 4, 5), (1, 1, 3, 1, 2)])
def test_a_dimension_of_one_reflects_onto_itself(shape):
    """A single frame stays what it is in time: repeating it three times changes nothing."""
    flow = torch.rand(shape, dtype=torch.float64)
    peaks = cvg.token_peaks(flow)
    grown = flow
    for dim in (2, 3, 4):
        if shape[dim] == 1:
            grown = grown.repeat_interleave(3, dim)
    torch.testing.assert_close(peaks, cvg.token_peaks(grown))
    assert (peaks <= 1).all() and (peaks >= 0).all()


def results(peaks_of, flow, grad):
    leaf = flow.detach().requires_grad_()
    peaks = peaks_of(leaf)
    return peaks.detach(), *torch.autograd.grad(peaks, leaf, grad)


KERNELS = [one for one in backends("token_peaks") if one.values[0] != "reference"]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("shape", "sharpness"),
    [
        ((2, 5, 4, 3, 6), 100.0),
        ((1, 3, 6, 8, 5), -2.0),
        ((2, 3, 1, 2, 9), 100.0),
        ((2, 3, 1, 2, 9), 3.0),
        ((2, 3, 1, 2, 9), -2.0),
        ((1, 1, 1, 1, 1), 3.0),
    ],
    ids=str,
)
@pytest.mark.drawn(6)
def test_kernels_against_float64(backend, sharpness, shape):
    flow = torch.rand(shape, device=device_of(backend))
    grad = torch.randn(shape[:2], device=flow.device)
    with cvg.trace_backends() as ran:
        found = results(lambda f: cvg.token_peaks(f, sharpness=sharpness, backend=backend), flow, grad)
    assert ran == [("token_peaks", backend), ("token_peaks_backward", backend)]
    stock = results(lambda f: reference.token_peaks(f, sharpness=sharpness), flow, grad)
    exact = results(lambda f: reference.token_peaks(f, sharpness=sharpness), flow.double(), grad.double())
    for have, eager, want in zip(found, stock, exact, strict=True):
        # The logits are as large as the sharpness, and so are their roundings.
        assert_as_exact_as(have, eager, want, factor=3, depth=16, size=1.0)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("backend", KERNELS)
def test_tokens_that_are_masked_and_places_that_tie(backend):
    """−∞ takes a token out; a token alone is 1 everywhere, and all places share its gradient."""
    flow = torch.rand(2, 4, 3, 4, 5, device=device_of(backend))
    flow[0, 1] = -torch.inf
    flow[1, :3] = -torch.inf
    found = cvg.token_peaks(flow, backend=backend)
    torch.testing.assert_close(found, reference.token_peaks(flow), rtol=1e-4, atol=1e-5)
    assert found[0, 1] == 0
    torch.testing.assert_close(found[1], torch.tensor([0, 0, 0, 1.0]).to(found))

    coarse = (torch.rand(1, 3, 2, 3, 3, dtype=torch.float64) > 0.5).float().to(flow.device)
    grad = torch.tensor([[1.0, 0.0, -2.0]], device=flow.device)
    have = results(lambda f: cvg.token_peaks(f, sharpness=2.0, backend=backend), coarse, grad)
    want = results(lambda f: reference.token_peaks(f, sharpness=2.0), coarse.double(), grad.double())
    for one, exact in zip(have, want, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_nan_is_not_lost(backend):
    flow = torch.rand(1, 2, 2, 3, 3, device=device_of(backend))
    flow[0, 1, 0, 1, 1] = torch.nan
    assert cvg.token_peaks(flow, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradients(backend):
    flow = torch.rand(1, 3, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def peaks(f):
        return cvg.token_peaks(f, sharpness=5.0, backend=backend)

    assert torch.autograd.gradcheck(peaks, flow)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(peaks, flow)
    else:
        (grad,) = torch.autograd.grad(peaks(flow).square().sum(), flow, create_graph=True)
        with pytest.raises(RuntimeError, match="backend='reference'"):
            torch.autograd.grad(grad.sum(), flow)
        torch.library.opcheck(torch.ops.cvg_kernels.token_peaks.default, (flow, 5.0, 0.5, backend))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"flow": torch.rand(2, 3, 4)}, r"flow must be floating point \[B, K, F, h, w\]"),
        ({"flow": torch.rand(1, 2, 0, 3, 3)}, "without empty dimensions"),
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.token_peaks(**({"flow": torch.rand(1, 2, 3, 4, 4)} | change))


@pytest.mark.drawn(12)
@pytest.mark.parametrize("backend", backends("token_peaks", "reference", "native", "triton"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sharpness", [100.0, -100.0])
def test_huge_flows_have_peaks(backend, dtype, sharpness):
    """sharpness · flow − its largest, fused, is off by half an ulp of either: once the exponent of e."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("its kernel is for 32 bits")
    flow = torch.rand(2, 3, 4, 5, 6, dtype=dtype)
    flow[0, 0, 0, 0, 0], flow[0, 1, 2, 3, 4], flow[1] = 1e30, 3e25, 1e28
    given = flow.requires_grad_()
    peaks = cvg.token_peaks(given, sharpness=sharpness, backend=backend)
    wanted = cvg.token_peaks(flow.double(), sharpness=sharpness, backend="reference")
    torch.testing.assert_close(peaks.double(), wanted, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(peaks.sum(), given)
    assert torch.isfinite(grad).all()
