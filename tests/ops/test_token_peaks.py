"""token_peaks against a plain convolution, and on volumes too thin for one."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv3d, pad

import cvg_kernels as cvg


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


def test_gradients():
    flow = torch.rand(1, 3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: cvg.token_peaks(f, sharpness=5.0), flow)
    assert torch.autograd.gradgradcheck(lambda f: cvg.token_peaks(f, sharpness=5.0), flow)


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
